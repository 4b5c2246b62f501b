"""Where the time of a whole compression goes, and how that compares with the paper's schedule in the same pipeline.

    python benchmarks/pipeline_speed.py MODEL --calibration c4.jsonl --evaluate wikitext2_test.raw [--blocks 8]
        [--efforts 1,0.35] [--against-plain] [--match] [--json FILE]

Prints the seconds of the walk, the statistics, the solves, saving and measuring, from the report's own clock, and the
perplexities, once for every effort. --blocks compresses only so many blocks at the front and leaves the rest dense.
--against-plain does the same with the paper's schedule done plainly, as in benchmarks/solver_speed.py. --match
compresses every block once, trains two copies of it by the preset "blocks" and by the paper's on the same inputs, and
judges both on windows that neither was trained on, by both presets' losses; the copy trained by "blocks" goes on to
the next block.
"""

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from _layers import machine, write_json
from solver_speed import plain_three_basil

from sparlow import compress
from sparlow.algorithms import decomposer
from sparlow.model.forward.activation_store import ActivationStore
from sparlow.model.forward.block_pass import BlockPass, pass_through
from sparlow.model.forward.capture import capture_block_inputs
from sparlow.model.loading.source import open_model
from sparlow.model.training.block_matching import BlockOutputs, loss_on, match
from sparlow.model.training.loop import MicroBatches
from sparlow.progress import Clock
from sparlow.recipe.budgets import select
from sparlow.recipe.recipe import Recipe
from sparlow.recipe.run_options import RunOptions
from sparlow.recipe.training_plan import HELD_OUT, PRESETS, training_of
from sparlow.run.compress import open_dense, windows_to_calibrate
from sparlow.run.pipeline import compress_block

PLAIN = "plain"
decomposer(PLAIN)(plain_three_basil)
PARTS = ("walk", "statistics", "solve", "matching", "save", "evaluate")


def whole(args: argparse.Namespace, recipe: Recipe) -> dict[str, Any]:
    """One compression from files to files."""
    with tempfile.TemporaryDirectory() as out:
        found = compress(
            args.model,
            recipe,
            out=Path(out) / "out",
            evaluate=[args.evaluate],
            evaluate_seqlen=args.evaluate_seqlen,
            limit=args.limit,
            device="cpu",
        )
    perplexities = {"dense": found.dense["perplexity"], "compressed": found.compressed["perplexity"]}
    seconds = {**found.seconds, "compression": found.seconds["total"] - found.seconds["evaluate"]}
    return {"seconds": seconds, "perplexity": perplexities, "mean_relative_error": found.mean_relative_error}


def show(name: str, run: dict[str, Any]) -> None:
    """Print one run."""
    seconds = run["seconds"]
    parts = ", ".join(f"{part} {seconds[part]:.1f}" for part in PARTS)
    (dense,), (compressed,) = (run["perplexity"][which].values() for which in ("dense", "compressed"))
    print(
        f"{name}: {seconds['compression']:.1f} s without measuring ({parts}); perplexity {dense:.2f}, {compressed:.2f}"
    )


def matched(args: argparse.Namespace, recipe: Recipe) -> list[dict[str, Any]]:
    """Both presets, block by block."""
    opened, storage = open_dense(args.model, None, recipe, RunOptions(device="cpu"), streamed=False)
    decoder, blocks = opened.decoder, opened.decoder.blocks
    allowed = select(opened.model, decoder, recipe, storage).budgets
    windows = windows_to_calibrate(None, opened, recipe)
    apart = max(len(windows) // HELD_OUT, 1)  # neither is trained on these
    batch = PRESETS["blocks"].plan.batch
    recording = capture_block_inputs(opened.model, windows, micro_batch=batch, apart=apart)
    last = -(-apart // batch)  # micro-batches of those
    hidden, rows = recording.hidden, []
    for i in range(min(args.blocks or len(blocks), len(blocks))):
        calls, targets, block = recording.calls[i], hidden.fresh(), blocks[i]
        through = BlockPass(block, calls, hidden, decoder.label(i), i)
        compress_block(through, recipe, allowed, storage, Clock(), lambda _: None, targets)
        first = ActivationStore("cpu", hidden[:-last])
        row: dict[str, Any] = {"block": i}
        for preset in ("paper", "blocks"):
            block = copy.deepcopy(blocks[i])
            training = training_of(recipe.changed(match=True, match_preset=preset))
            # "blocks" sets aside the last of what it is given to stop by; the paper's trains on all of it
            data = MicroBatches(first, targets[:-last], held_out=1 if training.plan.patience else 0)
            done = match(BlockPass(block, calls, first), data, training.objective, training.plan, seed=i)
            unseen = MicroBatches(hidden, targets, held_out=last)
            judged = {
                kind: loss_on(
                    BlockPass(block, calls, hidden),
                    unseen,
                    BlockOutputs(relative=kind == "relative", from_dense=False),
                )
                for kind in ("relative", "plain")
            }
            row[preset] = {"seconds": done.seconds, "epochs": done.epochs, **judged}
        rows.append(row)
        print(f"block {i}: " + "; ".join(f"{p} {_words(row[p])}" for p in ("blocks", "paper")), flush=True)
        with torch.no_grad():
            hidden = pass_through(BlockPass(block, calls, hidden))
    return rows


def _behind(model: str, blocks: int) -> list[str]:
    """Names of the blocks that stay dense."""
    decoder = open_model(model, streamed=True).decoder
    return [decoder.layer_name(i, "*") for i in range(blocks, len(decoder))]


def _words(found: dict[str, float]) -> str:
    return f"relative {found['relative']:.5f}, plain {found['plain']:.5f}, {found['seconds']:.1f} s"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="directory, hub id or .gguf file")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--evaluate", default="builtin")
    parser.add_argument("--evaluate-seqlen", type=int, default=1024)
    parser.add_argument("--limit", type=int, default=24)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--blocks", type=int, help="compress only so many at the front")
    parser.add_argument("--efforts", default="1", help="comma-separated")
    parser.add_argument("--against-plain", action="store_true")
    parser.add_argument("--match", action="store_true")
    parser.add_argument("--json", type=Path, dest="json_file")
    args = parser.parse_args()
    given = {name: getattr(args, name) for name in ("calibration", "samples", "seqlen", "rank", "pattern")}
    recipe = Recipe(**given, ignore=_behind(args.model, args.blocks) if args.blocks else ())
    found: dict[str, Any] = {}
    for effort in args.efforts.split(","):
        name = f"effort {effort}"
        found[name] = whole(args, recipe.changed(options={"effort": effort}))
        show(name, found[name])
    if args.against_plain:
        plain = whole(args, recipe.changed(algorithm=PLAIN))
        show(PLAIN, plain)
        for name, ours in found.items():
            ours["ratio"] = {p: plain["seconds"][p] / ours["seconds"][p] for p in ("solve", "compression")}
            print(f"{name}: " + ", ".join(f"{part} {ratio:.1f} times faster" for part, ratio in ours["ratio"].items()))
        found[PLAIN] = plain
    if args.match:
        found["matching"] = matched(args, recipe)
    if args.json_file:
        write_json(args.json_file, {"machine": machine(), "arguments": vars(args), **found})


if __name__ == "__main__":
    main()
