"""What `sparlow plan` foresees beside what a run then takes, each in a process of its own.

    python benchmarks/plan.py [--widths 512,1024] [--blocks 2] [--model DIR] [--option effort=0.1]
        [--match PRESET] [--json FILE]

Writes checkpoints with random weights (benchmarks/_shapes.py) of so many blocks into a temporary folder, calibrates on
random windows and measures no perplexity; --model takes a model that is there instead, calibrates on the builtin text
and measures perplexity on --limit windows of it. Printed are predicted and measured peak of resident memory (of the
whole process; files mapped into memory count), predicted and measured seconds by stage, and the measured over the
predicted.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _layers import machine, write_json
from _shapes import Shape, random_windows, write

GB = 1e9
STAGES = {  # of a plan: what of a report it is
    "evaluate": ("evaluate",),
    "walk": ("walk", "statistics"),
    "solve": ("solve",),
    "matching": ("matching",),
    "save": ("save",),
}


def child(call: dict[str, Any]) -> dict[str, Any]:
    """Plan or compress in this process."""
    import sparlow
    from sparlow.recipe.recipe import GIVEN_WINDOWS

    windows = random_windows(call["vocabulary"], call["recipe"]["samples"], call["recipe"]["seqlen"])
    text = {"evaluate": ("builtin",), "limit": call["limit"]} if call["text"] else {"evaluate": ()}
    recipe = sparlow.Recipe(**call["recipe"], calibration="builtin" if call["text"] else GIVEN_WINDOWS)
    if call["do"] == "plan":
        return json.loads(sparlow.plan(call["folder"], recipe, device="cpu", **text).to_json())
    start = time.perf_counter()
    given = None if call["text"] else windows
    report = sparlow.compress(call["folder"], recipe, calibration=given, out=call["out"], device="cpu", **text)
    return {
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "cpu_seconds": time.process_time(),
        "seconds": {**report.seconds, "total": time.perf_counter() - start},
        "bytes": report.bytes,
    }


def in_a_process(call: dict[str, Any]) -> dict[str, Any]:
    """Run ``child`` in a process of its own."""
    with tempfile.TemporaryDirectory() as out:
        arguments = [sys.executable, __file__, "--child", json.dumps({**call, "out": f"{out}/out"})]
        found = subprocess.run(arguments, stdout=subprocess.PIPE, check=True)  # noqa: S603 - this very script
    result: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return result


def compared(name: str, folder: Path, args: argparse.Namespace, *, vocabulary: int, text: bool) -> dict[str, Any]:
    """Plan, run, and print both."""
    recipe: dict[str, Any] = {"samples": args.samples, "seqlen": args.seqlen, "algorithm": args.algorithm}
    recipe |= {"pattern": args.pattern, "options": dict(pair.split("=") for pair in args.option)}
    if args.match:
        recipe |= {"match": True, "match_preset": args.match}
    call = {"folder": str(folder), "recipe": recipe, "text": text, "limit": args.limit, "vocabulary": vocabulary}
    plan, run = (in_a_process({**call, "do": what}) for what in ("plan", "compress"))
    predicted, measured = plan["peak_memory"]["rss"], run["peak"]
    foreseen, taken = plan["seconds"]["total"], run["seconds"]["total"]
    same = "equal" if plan["bytes"] == run["bytes"] else "not equal"
    print(
        f"{name}: memory {predicted / GB:.2f} GB predicted, {measured / GB:.2f} GB measured, "
        f"{measured / predicted:.2f} of it; time {foreseen:.0f} s predicted, {taken:.0f} s measured, "
        f"{taken / foreseen:.2f} of it ({run['cpu_seconds']:.0f} s of the processor); bytes {same}"
    )
    parts = {
        stage: (plan["seconds"][stage], sum(run["seconds"][part] for part in parts)) for stage, parts in STAGES.items()
    }
    print("   seconds: " + ", ".join(f"{stage} {p:.1f} → {m:.1f}" for stage, (p, m) in parts.items()))
    rows = (f"{s['name']} {(plan['baseline'] + s['cpu']) / GB:.2f}" for s in plan["stages"])
    print(f"   memory: before {plan['baseline'] / GB:.2f}, " + ", ".join(rows), flush=True)
    return {"plan": plan, "run": run}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", default="512,1024", help="of the models with random weights, separated by commas")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--model", type=Path, help="directory of a model to take instead")
    parser.add_argument("--algorithm", default="3basil")
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--option", action="append", default=[], help="key=value of the algorithm; repeatable")
    parser.add_argument("--match", metavar="PRESET", help="also train, by this preset of --match-preset")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--limit", type=int, default=8, help="windows of perplexity, with --model")
    parser.add_argument("--json", type=Path, dest="json_file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(json.loads(args.child))))
        return
    found = {}
    if args.model:
        found[args.model.name] = compared(args.model.name, args.model, args, vocabulary=1, text=True)
    for width in [] if args.model else map(int, args.widths.split(",")):
        shape = Shape(width, 7 * width // 2, width // 64, max(width // 256, 1), 16384, args.blocks)
        with tempfile.TemporaryDirectory() as scratch:
            write(shape, args.blocks, Path(scratch))
            name = f"width {width}, {args.blocks} blocks"
            found[name] = compared(name, Path(scratch), args, vocabulary=shape.vocabulary, text=False)
    if args.json_file:
        arguments = {name: value for name, value in vars(args).items() if name not in ("child", "json_file")}
        write_json(args.json_file, {"machine": machine(), "arguments": arguments, "cases": found})


if __name__ == "__main__":
    main()
