"""What the projection on a pattern takes inside a solver, beside the one dense product of an iteration.

    OMP_NUM_THREADS=1 python benchmarks/patterns.py [--patterns 2:4,4:8,8:16,16:32,0.5]
        [--shapes 1536x576,576x1536,2048x2048] [--repeats 25] [--json FILE]

Product (out, in) × (in, in) and projections take turns in one process, and what counts is the processor's time, so that
other programs slow all of them alike. Printed are the median of the product's milliseconds, and the median of each
projection over that of the product.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _layers import machine, write_json

from sparlow.errors import InputError
from sparlow.linalg.patterns import Pattern, parse_pattern

PRODUCT = "product"
Call = Callable[[], object]


def measure(shape: tuple[int, int], patterns: list[Pattern], repeats: int) -> dict[str, float]:
    """Return the median of the milliseconds of a product and of the projection on each pattern, by name."""
    generator = torch.Generator().manual_seed(0)
    X, M = torch.randn(shape, generator=generator), torch.randn(shape[1], shape[1], generator=generator)
    D, out = torch.empty_like(X), torch.empty_like(X)
    calls: dict[str, Call] = {PRODUCT: lambda: torch.addmm(X, X, M, out=out)}
    for pattern in patterns:
        project = pattern.projector()
        calls[str(pattern)] = lambda project=project: project(X, D)
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):  # the first is not counted: it takes memory
        for name, call in calls.items():
            start = time.process_time()
            call()
            taken[name] += [1000 * (time.process_time() - start)] if turn else []
    return {name: statistics.median(times) for name, times in taken.items()}


def main() -> None:
    """Measure every shape, and print a line for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--patterns", default="2:4,4:8,8:16,16:32,0.5")
    parser.add_argument("--shapes", default="1536x576,576x1536,2048x2048", help="OUTxIN, separated by commas")
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    try:
        patterns = [parse_pattern(text) for text in args.patterns.split(",")]
        shapes = [tuple(map(int, text.split("x"))) for text in args.shapes.split(",")]
        for pattern in patterns:
            for out, columns in shapes:
                pattern.check((out, columns))
    except (InputError, ValueError) as error:
        parser.error(str(error))
    found: dict[str, Any] = {"machine": machine(), "repeats": args.repeats, "milliseconds": {}}
    for out, columns in shapes:
        taken = measure((out, columns), patterns, args.repeats)
        found["milliseconds"][f"{out}x{columns}"] = taken
        shares = (f"{name} {taken[name] / taken[PRODUCT]:.3f}" for name in taken if name != PRODUCT)
        print(f"{out} x {columns}: product {taken[PRODUCT]:.1f} ms; {', '.join(shares)}", flush=True)
    if args.json:
        write_json(args.json, found)


if __name__ == "__main__":
    main()
