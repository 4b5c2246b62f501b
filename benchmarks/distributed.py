"""One compression by several processes beside the same by one: how far apart they end, bytes sent, wall seconds.

    python benchmarks/distributed.py [--processes 2] [--json FILE] MODEL -- OPTIONS
    python benchmarks/distributed.py --sleep 30 [--json FILE]

OPTIONS are those of ``sparlow compress``. Each process has one thread here. Printed are the largest difference between
the relative errors of a layer, relative to the one process's; both perplexities; wall seconds without evaluation; and
the bytes that a process gave to collective operations, a block.

--sleep shows how solves overlap on a machine that has fewer cores than processes: 1, 2 and 4 processes compress one
block, a small one of the proportions of each of SHAPES, in which a solve sleeps in proportion to what the division
takes for its cost, in² (out + in); --sleep is the seconds of the whole block. Of a layer that all solve together,
in² out is divided; of the factorisations, in³, the LEVELS that processes find ahead for each other are divided, and
those that depend on the Gram matrix alone are not. Beside the wall seconds stands the least that a division by whole
layers could take.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _layers import machine, write_json
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sparlow.distributed import joined
from sparlow.model.artefact.dtypes import StoredDtypes
from sparlow.model.forward.block_pass import BlockPass
from sparlow.model.forward.capture import capture_block_inputs
from sparlow.model.forward.decoder import Decoder
from sparlow.progress import Clock
from sparlow.recipe.budgets import select
from sparlow.recipe.recipe import Recipe
from sparlow.report.records import Report
from sparlow.run.divided import cost

SHAPES = {  # hidden, intermediate, heads of keys and values beside 8 of queries: the proportions of the model's
    "Llama-2-7B": (256, 688, 8),
    "Llama-3-8B": (256, 896, 2),
    "Llama-3-70B": (256, 896, 1),
}
COUNTS = (1, 2, 4)
ONCE, LEVELS = 2, 11  # factorisations of 3basil at effort 0.5: for its coordinates, and for values of ρ


def main() -> None:
    """Run both and print the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--sleep", type=float, help="seconds that all solves of a block sleep together")
    parser.add_argument("--shape", choices=SHAPES, help="be one of the processes, for a block of this shape")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("options", nargs=argparse.REMAINDER, help="of sparlow compress, after --")
    args = parser.parse_args()
    if args.shape:
        sleeping_block(args.shape, args.sleep)
        return
    if args.sleep:
        overlaps(args.sleep, args.json)
        return
    args.options = [option for option in args.options if option != "--"]
    with tempfile.TemporaryDirectory() as folder:
        alone = _run(Path(folder) / "alone", 1, args)
        several = _run(Path(folder) / "several", args.processes, args)
    found = compared(alone, several)
    for name, value in found.items():
        print(f"{name.replace('_', ' ')}: {value}")
    if args.json:
        write_json(args.json, {"machine": machine(), "options": args.options, "processes": args.processes, **found})


def compared(alone: Report, several: Report) -> dict[str, Any]:
    """What differs between two reports of the same compression."""
    pairs = list(zip(alone.layers, several.layers, strict=True))
    return {
        "largest_difference_of_relative_errors": max(
            abs(other.relative_error / one.relative_error - 1) for one, other in pairs
        ),
        "mean_relative_error": [alone.mean_relative_error, several.mean_relative_error],
        "perplexity": [list(report.compressed["perplexity"].values()) for report in (alone, several)],
        "seconds": [report.seconds["total"] - report.seconds["evaluate"] for report in (alone, several)],
        "bytes_per_block": several.processes["bytes_per_block"],
    }


def overlaps(seconds: float, file: Path | None) -> None:
    """Print the wall seconds of 1, 2 and 4 processes for one block of each shape, solves sleeping."""
    found = {}
    for shape in SHAPES:
        rows = []
        for count in COUNTS:
            command = [*_starting(count), __file__, "--shape", shape, "--sleep", str(seconds)]
            done = subprocess.run(command, check=True, env=_environment(), stdout=subprocess.PIPE, text=True)  # noqa: S603 - this file
            rows.append(json.loads(done.stdout.splitlines()[-1]))
        alone = rows[0]["wall"]
        for count, row in zip(COUNTS, rows, strict=True):
            print(
                f"{shape}, {count} processes: {row['wall']:.1f} s of wall time, {row['wall'] / alone:.2f} of one's; "
                f"by whole layers at least {row['least']:.2f}"
            )
        found[shape] = dict(zip(map(str, COUNTS), rows, strict=True))
    if file:
        write_json(file, {"machine": machine(), "sleep": seconds, "blocks": found})


def sleeping_block(shape: str, seconds: float) -> None:
    """Compress one block as one of the processes, solves sleeping; the first prints its wall seconds."""
    from sparlow.linalg import shared_rows
    from sparlow.run import pipeline

    hidden, intermediate, heads = SHAPES[shape]
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=hidden,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=heads,
    )
    model = LlamaForCausalLM(config).eval()
    decoder, recipe, storage = Decoder.of(model), Recipe(algorithm="magnitude"), StoredDtypes.of(model)
    budgets = select(model, decoder, recipe, storage).budgets
    costs = [cost(weight.shape) for weight in decoder.weights(0).values()]
    solver = pipeline._solver  # noqa: SLF001 - what is to be slow

    def sleeping(*given: Any) -> Any:  # noqa: ANN401 - as it is
        solving = solver(*given)

        def solve(W: Tensor) -> Any:  # noqa: ANN401 - the same
            (rows, features), shared = W.shape, shared_rows._rows.get()  # noqa: SLF001 - whether W is a part
            levels = -(-LEVELS // (shared.size if shared else 1))
            factorisations = features**3 * (ONCE + levels) / (ONCE + LEVELS)
            time.sleep(seconds * (features**2 * rows + factorisations) / sum(costs))
            return solving(W)

        return solve

    pipeline._solver = sleeping  # noqa: SLF001 - the same
    with joined() as processes, torch.no_grad():
        windows = torch.randint(0, hidden, (8, 32), generator=torch.Generator().manual_seed(1))
        recording = capture_block_inputs(model, windows, micro_batch=8, processes=processes)
        through = BlockPass(decoder.blocks[0], recording.calls[0], recording.hidden, decoder.label(0), 0, processes)
        processes.barrier()
        start = time.perf_counter()
        pipeline.compress_block(through, recipe, budgets, storage, Clock(), lambda _: None)
        processes.barrier()
        wall = time.perf_counter() - start
        if processes.first:
            print(json.dumps({"wall": wall, "least": max(max(costs) / sum(costs), 1 / processes.size)}))


def _starting(processes: int) -> list[str]:
    several = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    return [sys.executable, *(several if processes > 1 else [])]


def _environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def _run(out: Path, processes: int, args: argparse.Namespace) -> Report:
    command = [*_starting(processes), "-m", "sparlow", "compress", args.model, "--out", str(out), *args.options]
    subprocess.run(command, check=True, env=_environment())  # noqa: S603 - the user's own command
    return Report.from_file(out / "report.json")


if __name__ == "__main__":
    main()
