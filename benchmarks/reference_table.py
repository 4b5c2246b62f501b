"""Our algorithms on two small problems, beside what the paper's public implementation reaches on them.

    python benchmarks/reference_table.py FOLDER [--algorithms a,b] [--json FILE]

FOLDER holds ``problems.py``, whose ``problem(name)`` returns W (out, in) and H (in, in) as NumPy arrays, and
``figures.json``: problem → pattern → algorithm → relative objective, lower is better. Rank 16 (pruners: 0), damping
0.005 and 0.005, default options. A name in the figures is looked up among our names and aliases.
"""

import argparse
import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from _layers import geometric_mean, machine, write_json
from torch import Tensor

from sparlow.algorithms import Algorithm, algorithms, find, solve
from sparlow.errors import InputError
from sparlow.linalg.gram import Gram
from sparlow.linalg.patterns import parse_pattern

RANK = 16
RIVALS = {"3basil": "hassle-free-alps"}  # a second figure to be below: the best of the older methods

Figures = dict[str, dict[str, dict[str, float]]]  # problem → pattern → algorithm → objective
Chosen = dict[str, tuple[Algorithm, dict[str, Any]]]  # name → the algorithm and its options


@dataclass(frozen=True, slots=True)
class Row:
    """One algorithm on one problem and pattern; ``figure`` is None where there is none to compare with."""

    problem: str
    pattern: str
    kind: str
    name: str
    against: str
    objective: float
    figure: float | None
    seconds: float

    @property
    def ratio(self) -> float | None:
        """Ours over the figure: below 1 is better."""
        return self.objective / self.figure if self.figure else None

    @property
    def label(self) -> str:
        """The algorithm, and whose figure it is compared with if not its own."""
        return self.name if self.against == self.name else f"{self.name} against {self.against}"

    def line(self) -> str:
        """One aligned line, under ``HEADER``."""
        figure = f"{self.figure:9.6f} {self.ratio:7.3f}" if self.figure else f"{'':9} {'':7}"
        return f"{self.problem:8} {self.pattern:>4}  {self.label:32} {self.objective:9.6f} {figure} {self.seconds:7.2f}"


HEADER = f"{'problem':8} {'keep':>4}  {'algorithm':32} {'ours':>9} {'figure':>9} {'ratio':>7} {'s':>7}"


def choose(figures: Figures, wanted: list[str]) -> Chosen:
    """Return the algorithms to run, each once, under the name that the figures give it if they know it.

    Args:
        figures: Their names come first; one that is not registered is skipped with a line saying so.
        wanted: Names to run; empty for every name in the figures and every registered algorithm.
    """
    known = dict.fromkeys(name for patterns in figures.values() for cell in patterns.values() for name in cell)
    chosen: Chosen = {}
    for name in wanted or [*known, *(a.name for a in algorithms())]:
        try:
            algorithm, alias = find(name)
        except InputError:
            if wanted:
                raise
            print(f"{name}: skipped, not registered here")
            continue
        entry = (algorithm, algorithm.parse_options(alias))
        if not any(_same(entry, other) for other in chosen.values()):
            chosen[name] = entry
    return chosen


def _same(one: tuple[Algorithm, dict[str, Any]], other: tuple[Algorithm, dict[str, Any]]) -> bool:
    """Whether two entries are one algorithm with the same options, given or by default."""
    full = [{n: o.default for n, o in algorithm.options.items()} | given for algorithm, given in (one, other)]
    return one[0] is other[0] and full[0] == full[1]


def solve_cell(cell: tuple[str, str], W: Tensor, H: Tensor, chosen: Chosen, figures: dict[str, float]) -> Iterator[Row]:
    """Run every algorithm on one (problem, pattern); a row follows each run."""
    for name, (algorithm, options) in chosen.items():
        rank = 0 if algorithm.kind == "pruner" else RANK
        stats = solve(algorithm, W, Gram.damped(H), parse_pattern(cell[1]), rank, options).stats
        for against in (name, RIVALS.get(name)):
            if against == name or against in figures:
                figure = figures.get(str(against))
                objective, seconds = float(stats["relative_error"]), float(stats["seconds"])
                yield Row(*cell, algorithm.kind, name, str(against), objective, figure, seconds)


def summarise(rows: list[Row]) -> dict[str, dict[str, float | str]]:
    """Return for each comparison the geometric mean and the largest of the ratios, and where that is."""
    labels = dict.fromkeys(row.label for row in rows if row.ratio is not None)
    return {label: _ratios([row for row in rows if row.label == label and row.ratio is not None]) for label in labels}


def _ratios(rows: list[Row]) -> dict[str, float | str]:
    worst = max(rows, key=lambda row: row.ratio or 0.0)
    mean = geometric_mean(row.ratio for row in rows if row.ratio is not None)
    return {"mean": mean, "largest": worst.ratio or 0.0, "where": f"{worst.problem} {worst.pattern}"}


def lowest(rows: list[Row]) -> dict[str, dict[str, str]]:
    """Return for each problem and pattern the decomposer and the pruner with the lowest objective."""
    best: dict[str, dict[str, str]] = {f"{row.problem} {row.pattern}": {} for row in rows}  # in the table's order
    for row in sorted(rows, key=lambda row: row.objective):
        best[f"{row.problem} {row.pattern}"].setdefault(row.kind, row.name)
    return best


def _load(folder: Path) -> tuple[Callable[[str], tuple[Any, Any]], Figures]:
    """Return ``problem`` of problems.py, and figures.json."""
    for file in (folder / "problems.py", folder / "figures.json"):
        if not file.is_file():
            raise InputError(f"There is no {file}: give the folder of the reference problems.")
    spec = importlib.util.spec_from_file_location("problems", folder / "problems.py")
    assert spec and spec.loader  # noqa: S101, PT018 - for the type checker: a .py file always has both
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.problem, json.loads((folder / "figures.json").read_text())


def main() -> None:
    """Print the table, then what it comes to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--algorithms", help="names separated by commas (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    try:
        problem, figures = _load(args.folder)
        chosen = choose(figures, args.algorithms.split(",") if args.algorithms else [])
    except InputError as error:
        parser.error(str(error))
    run_on = machine()
    print(HEADER)
    rows: list[Row] = []
    for name, patterns in figures.items():
        W, H = (torch.from_numpy(array) for array in problem(name))
        for pattern, cell in patterns.items():
            for row in solve_cell((name, pattern), W, H, chosen, cell):
                rows.append(row)
                print(row.line(), flush=True)
    _report(rows)
    if args.json:
        figures_of_ours = [asdict(row) | {"ratio": row.ratio} for row in rows]
        result = {"rows": figures_of_ours, "summary": summarise(rows), "lowest": lowest(rows)}
        write_json(args.json, {"version": 1, "machine": run_on, "rank": RANK, **result})


def _report(rows: list[Row]) -> None:
    print(f"\n{'ours / figure':32} {'geometric mean':>14} {'largest':>8}")
    for label, ratios in summarise(rows).items():
        print(f"{label:32} {ratios['mean']:14.3f} {ratios['largest']:8.3f}  {ratios['where']}")
    print("\nlowest of ours")
    for cell, best in lowest(rows).items():
        print(f"{cell:14} {', '.join(f'{kind}: {name}' for kind, name in sorted(best.items()))}")


if __name__ == "__main__":
    main()
