"""Time and error of every method on the linear layers of one block of a real model.

    python benchmarks/methods.py --block 15 --pattern 2:4 --rank 16 --json FILE

All registered methods (each of its published combinations once), default options unless ``--option NAME.key=value``,
the same W and H, in the same process and on the same threads. The objective is tr((W − S − UV) H (W − S − UV)ᵀ)
relative to tr(W H Wᵀ), of the damped H; the time is that of a block, the sum over its layers, from the undamped H.
"""

import argparse
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from _layers import block_layers, geometric_mean, machine, write_json

from sparlow.algorithms import Algorithm, find, solve, variants
from sparlow.cli.options import parse_named_pairs
from sparlow.errors import InputError
from sparlow.linalg.gram import Gram
from sparlow.linalg.patterns import parse_pattern


@dataclass(frozen=True, slots=True)
class Row:
    """One method: seconds and objective by layer."""

    name: str
    rank: int
    seconds: dict[str, float]
    objective: dict[str, float]

    @property
    def total(self) -> float:
        """Seconds for the block."""
        return sum(self.seconds.values())

    @property
    def mean(self) -> float:
        """Geometric mean of the objectives."""
        return geometric_mean(self.objective.values())


def main() -> None:
    """Solve every layer by every method; print a line for each and, relative to ``--against``, the means."""
    parser = _parser()
    args = parser.parse_args()
    names = args.algorithms.split(",") if args.algorithms else list(variants())
    try:
        options = parse_named_pairs(args.option)
        unknown = [name for name in options if name not in names]
        if unknown:
            raise InputError(f"--option {unknown[0]}.… is of no method that is run: {', '.join(names)}.")  # noqa: TRY301
        pattern = parse_pattern(args.pattern)
        layers = block_layers(args.model, args.block, corpus="builtin", samples=args.samples, seqlen=args.seqlen)
        methods = {name: _method(name, options.get(name, {})) for name in names}
    except (InputError, ValueError) as error:
        parser.error(str(error))
    rows: list[Row] = []
    print(f"{'method':24} {'rank':>4} {'s a block':>10} {'objective':>10}", flush=True)
    for name, (algorithm, parsed) in methods.items():
        rank = 0 if algorithm.kind == "pruner" else args.rank
        seconds, objective = {}, {}
        for layer, (W, H) in layers.items():
            start = time.perf_counter()
            found = solve(algorithm, W, Gram.damped(H), pattern, rank, parsed)
            seconds[layer], objective[layer] = time.perf_counter() - start, float(found.stats["relative_error"])
        rows.append(Row(name, rank, seconds, objective))
        print(f"{name:24} {rank:4} {rows[-1].total:10.2f} {rows[-1].mean:10.6f}", flush=True)
        if args.json:  # after every method: an interrupted run leaves what it has
            figures = {
                "version": 1,
                "machine": machine(),
                "arguments": vars(args),
                "rows": [asdict(row) for row in rows],
            }
            write_json(args.json, figures)
    _print_ratios(rows, args.against)


def _print_ratios(rows: list[Row], against: str) -> None:
    base = next((row for row in rows if row.name == against), None)
    for row in rows if base else []:
        if base and row is not base:
            print(
                f"{row.name}: {row.total / base.total:.1f} times the seconds of {against}, "
                f"{row.mean / base.mean:.2f} times its objective"
            )


def _method(name: str, options: Mapping[str, str]) -> tuple[Algorithm, dict[str, Any]]:
    algorithm, implied = find(name)
    return algorithm, algorithm.parse_options({**implied, **options})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", help="directory, hub id or .gguf file (default: the embedded small model)")
    parser.add_argument("--block", type=int, default=15)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--rank", type=int, default=16, help="of methods with a low-rank part")
    parser.add_argument("--algorithms", help="comma-separated; default: all")
    parser.add_argument("--option", action="append", default=[], help="NAME.key=value; repeatable")
    parser.add_argument("--against", default="3basil", help="the method that the others are compared with")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser


if __name__ == "__main__":
    main()
