"""Whether a change made the solver slower: solves of this checkout and of an older one, in alternation.

    git worktree add ../before COMMIT
    python benchmarks/before.py ../before --block 15 --patterns 2:4,0.5 --ranks 64,16 --values int4,int3 --json FILE

Each checkout solves in a process of its own, with the same W and H, one after the other, so that both meet the same
machine. Values are of this checkout alone: they say what a grid costs beside the same solve without one.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _checkout import ROOT
from _layers import block_layers, geometric_mean, machine, write_json

# What a process does: read a case a line, solve it, answer with processor seconds and the relative error.
WORKER = """
import json, sys, time, torch
from sparlow.algorithms import find, solve
from sparlow.linalg.gram import Gram
from sparlow.linalg.patterns import parse_pattern
layers = torch.load(sys.argv[1])
for line in sys.stdin:
    case = json.loads(line)
    algorithm, _ = find(case["algorithm"])
    W, H = layers[case["layer"]]
    grid = {}
    if case["values"]:
        from sparlow.linalg.grid import make_grid
        grid = {"grid": make_grid(case["values"]), "int8_factors": True}
    gram, options = Gram.damped(H), {"effort": case["effort"]} if case["effort"] else {}
    start = time.process_time()
    found = solve(algorithm, W, gram, parse_pattern(case["pattern"]), case["rank"], options, **grid)
    seconds = time.process_time() - start
    live = W * ~gram.dead
    error = gram.relative_error(live, live - (found.S if found.U is None else found.S + found.U @ found.V))
    print(json.dumps({"seconds": seconds, "error": float(error)}), flush=True)
"""
NOW, BEFORE = "now", "before"


class Worker:
    """A process that solves with the package of one checkout."""

    def __init__(self, checkout: Path, layers: Path) -> None:
        """Start it.

        Args:
            checkout: Its root.
            layers: File of W and H by name.
        """
        here = os.environ | {"PYTHONPATH": str(checkout / "src")}
        words = (sys.executable, "-c", WORKER, str(layers))
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=here)  # noqa: S603

    def solve(self, case: dict[str, Any]) -> dict[str, float]:
        """Return processor seconds and relative error of one solve."""
        stdin, stdout = self.process.stdin, self.process.stdout
        if stdin is None or stdout is None:
            raise RuntimeError("The process has no pipes.")
        stdin.write(json.dumps(case) + "\n")
        stdin.flush()
        found: dict[str, float] = json.loads(stdout.readline())
        return found


def cases(args: argparse.Namespace, names: list[str]) -> Iterator[dict[str, Any]]:
    """Every case once."""
    for pattern in args.patterns.split(","):
        for rank in args.ranks.split(","):
            for name in names:
                yield {
                    "algorithm": args.algorithm,
                    "effort": args.effort,
                    "layer": name,
                    "pattern": pattern,
                    "rank": int(rank),
                }


def compare(case: dict[str, Any], workers: dict[str, Worker], values: list[str], repeats: int) -> dict[str, Any]:
    """Solve one case in every way, in alternation, and return the medians."""
    ways = {name: (worker, None) for name, worker in workers.items()}
    ways |= {kind: (workers[NOW], kind) for kind in values}
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for repeat in range(repeats):
        for way in list(ways)[:: -1 if repeat % 2 else 1]:
            worker, kind = ways[way]
            found[way].append(worker.solve(case | {"values": kind}))
    seconds = {way: median(run["seconds"] for run in runs) for way, runs in found.items()}
    return case | {"seconds": seconds, "error": {way: runs[0]["error"] for way, runs in found.items()}}


def summarise(rows: list[dict[str, Any]], ways: list[str]) -> dict[str, dict[str, float]]:
    """Geometric means over all cases; of ``now`` beside ``before``, of a grid beside ``now``."""
    found = {}
    for way in ways:
        beside = BEFORE if way == NOW else NOW
        found[f"{way} / {beside}"] = {
            what: geometric_mean(row[what][way] / row[what][beside] for row in rows) for what in ("seconds", "error")
        }
    return found


def main() -> None:
    """Solve all cases, one line each, then the means."""
    args = _parser().parse_args()
    values = args.values.split(",") if args.values else []
    layers = block_layers(args.model, args.block, corpus=args.corpus, samples=args.samples, seqlen=args.seqlen)
    rows = []
    with ExitStack() as stack:
        file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "layers.pt"
        torch.save(layers, file)
        workers = {BEFORE: Worker(args.before.resolve(), file), NOW: Worker(ROOT, file)}
        for worker in workers.values():
            stack.callback(worker.process.kill)
        for case in cases(args, list(layers)):
            rows.append(compare(case, workers, values, args.repeats))
            row = rows[-1]
            figures = (f"{way} {taken:.2f} s {row['error'][way]:.5f}" for way, taken in row["seconds"].items())
            print(f"{case['layer']:20} {case['pattern']:>5} {case['rank']:4}", *figures, sep="  ", flush=True)
    summary = summarise(rows, [NOW, *values])
    for name, mean in summary.items():
        print(f"{name}: {mean['seconds']:.3f} of the time, {mean['error']:.3f} of the error")
    if args.json:
        write_json(args.json, {"machine": machine(), "arguments": vars(args), "summary": summary, "cases": rows})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("before", type=Path, help="root of the older checkout")
    parser.add_argument("--model", help="directory, hub id or .gguf file (default: the embedded small model)")
    parser.add_argument("--algorithm", default="3basil")
    parser.add_argument("--effort", type=float, help="of the method (default: its own)")
    parser.add_argument("--block", type=int, default=15)
    parser.add_argument("--corpus", default="builtin")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--patterns", default="2:4,0.5")
    parser.add_argument("--ranks", default="64,16")
    parser.add_argument("--values", help="grids beside, such as int4,int3; the pattern is kept")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser


if __name__ == "__main__":
    main()
