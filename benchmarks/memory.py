"""Peak memory of a compression, each case in a process of its own.

    python benchmarks/memory.py [--shape llama-3-8b] [--blocks 2,4] [--model FILE] [--option max_steps=2] [--json FILE]

Writes a checkpoint with random weights in a shape (benchmarks/_shapes.py) into a temporary folder, compresses it to 2:4
and rank 64 on 16 × 256 tokens and measures its perplexity before and after; --model measures one that is there instead.
Printed are the peak of resident memory (of the whole process; files mapped into memory count) and how much that is
beyond the interpreter with its libraries. Few iterations take as much memory as many, and so does --brief, which cuts
the refit of 3basil to one step.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _layers import machine, write_json
from _shapes import SHAPES, random_windows, write

GB = 1e9


def measure(
    folder: str, out: str, samples: int, seqlen: int, options: dict[str, str], algorithm: str, *, brief: bool
) -> dict[str, Any]:
    """Compress one model in this process."""
    from sparlow.algorithms import three_basil
    from sparlow.machine import peak_memory
    from sparlow.recipe.recipe import GIVEN_WINDOWS, Recipe
    from sparlow.recipe.run_options import RunOptions
    from sparlow.run.compress import open_dense
    from sparlow.run.job import Job

    if brief:
        three_basil.REFITS = three_basil.REFIT_STEPS = 1
    empty = peak_memory()["rss"]
    rank = {"rank": 64} if algorithm == "3basil" else {}
    size = {"samples": samples, "seqlen": seqlen}
    recipe = Recipe(algorithm=algorithm, options=options, calibration=GIVEN_WINDOWS, **rank, **size)
    opened, storage = open_dense(folder, None, recipe, RunOptions(device="cpu"))
    vocabulary = opened.model.config.vocab_size
    windows = random_windows(vocabulary, samples, seqlen)
    job = Job(opened, storage, recipe, windows, lambda _: None)
    job.write_to(Path(out), overwrite=False)
    opening = peak_memory()["rss"]
    report = job.go({"the same windows": windows})
    return {
        "libraries": empty,
        "peak": max(opening, report.peak_memory["rss"]),  # a run forgets what was before it
        "seconds": report.seconds,
        "warnings": list(opened.warnings),
    }


def in_a_process(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run ``measure`` in a process of its own."""
    with tempfile.TemporaryDirectory() as out:
        call = {name: getattr(args, name) for name in ("samples", "seqlen", "algorithm", "brief")}
        call |= {"folder": folder, "out": out, "options": dict(pair.split("=") for pair in args.option)}
        found = subprocess.run(  # noqa: S603 - this very script
            [sys.executable, __file__, "--child", json.dumps(call, default=str)], stdout=subprocess.PIPE, check=True
        )
    result: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--blocks", default="2,4", help="numbers of blocks, separated by commas")
    parser.add_argument("--model", help="directory or .gguf file to measure instead")
    parser.add_argument("--algorithm", default="3basil")
    parser.add_argument("--option", action="append", default=[], help="key=value of the algorithm; repeatable")
    parser.add_argument("--brief", action="store_true", help="one step of refit")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--json", type=Path, dest="json_file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(**json.loads(args.child))))
        return
    found = {}
    for blocks in [0] if args.model else [int(count) for count in args.blocks.split(",")]:
        with tempfile.TemporaryDirectory() as scratch:
            if not args.model:
                write(SHAPES[args.shape], blocks, Path(scratch))
            name = args.model or f"{args.shape}, {blocks} blocks"
            found[name] = one = in_a_process(args.model or Path(scratch), args)
        beyond = (one["peak"] - one["libraries"]) / GB
        print(
            f"{name}: peak {one['peak'] / GB:.2f} GB, {beyond:.2f} GB beyond the libraries; {one['seconds']}",
            flush=True,
        )
    if args.json_file:
        arguments = {name: value for name, value in vars(args).items() if name not in ("child", "json_file")}
        write_json(args.json_file, {"machine": machine(), "arguments": arguments, "cases": found})


if __name__ == "__main__":
    main()
