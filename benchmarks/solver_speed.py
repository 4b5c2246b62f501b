"""How fast and how good the 3BASiL solver is, beside the paper's schedule done plainly.

    python benchmarks/solver_speed.py --block 15 --patterns 2:4,0.5 --ranks 64,16 --json FILE

Every case is a linear layer of one block of a real model, with a pattern and a rank. Three solves of the same W and H,
in the same process and on the same threads, from the undamped H to S, U and V:

* plain    the paper's equations, as ``plain_three_basil`` below writes them down;
* default  ours as it comes;
* equal    ours at the smallest effort of a short ladder that ends at or below the plain version's objective.

The objective is tr((W − S − UV) H (W − S − UV)ᵀ) / tr(W H Wᵀ) of the damped H. Set OMP_NUM_THREADS for the threads.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _layers import block_layers, geometric_mean, machine, write_json
from torch import Tensor

from sparlow.algorithms import Decomposition, find, solve
from sparlow.errors import InputError
from sparlow.linalg.gram import Gram
from sparlow.linalg.patterns import NM, Pattern, parse_pattern

# efforts, upwards, until one matches the plain version
LADDER = (0.1, 0.12, 0.15, 0.2, 0.25, 0.3, 0.35, 0.42, 0.5, 0.7, 1.0, 2.0, 4.0)
SPARE = 8  # columns of the plain version's randomised SVD beyond the rank
CORNER = 96  # of the first layer, for the warm-up


def plain_three_basil(W: Tensor, gram: Gram, pattern: Pattern, rank: int) -> Decomposition:
    """3BASiL as its paper states it: every product of an iteration is formed, in the paper's order.

    One eigendecomposition G = Q diag(λ) Qᵀ gives both (G + ρI)⁻¹ for every ρ and a root of G; four dense products
    with an (in, in) matrix an iteration. D starts at W: from its projection it takes as long and ends as low. The
    randomised SVD has a few columns to spare: without them a step is up to 10 % quicker, the result up to 6 % worse.
    On the reference problems (rank 16) this ends within 4 % of the paper's public implementation, 1 % on average.

    Args:
        W: Weight (out, in).
        gram: Of the inputs (in, in).
        pattern: Of S.
        rank: Of the low-rank part, at least 1.
    """
    torch.manual_seed(0)  # svd_lowrank draws from the global generator
    T, G = W * gram.scale, gram.correlation
    eigenvalues, Q = torch.linalg.eigh(G)
    roots = eigenvalues.clamp_min(torch.finfo(W.dtype).eps).sqrt()
    whiten, unwhiten = Q * roots, Q / roots  # R with R Rᵀ = G, and its inverse transposed
    D, dual, L, rho = T, torch.zeros_like(T), torch.zeros_like(T), 0.1
    seen, kept = keep_largest(T.abs(), pattern), pattern.kept((T.shape[0], T.shape[1]))
    for step in range(1, 2001):
        S = ((T - L) @ G - dual + rho * D) @ Q / (eigenvalues + rho) @ Q.T
        X = S + dual / rho
        mask = keep_largest(X.abs(), pattern)
        D = X * mask
        dual = dual + rho * (S - D)
        P, sigma, N = torch.svd_lowrank((T - S) @ whiten, q=min(rank + SPARE, *W.shape))
        U, V = P[:, :rank] * sigma[:rank], N[:, :rank].T @ unwhiten.T
        L = U @ V
        if step % 10 == 0:
            change = (mask ^ seen).sum().item() / kept
            seen = mask
            if step >= 100 and change < 3e-4:
                break
            rho *= 1.1 if change > 0.1 else 1.05 if change > 0.005 else 1.02
    return Decomposition(D / gram.scale, U, V / gram.scale, {"iterations": step})


def keep_largest(scores: Tensor, pattern: Pattern) -> Tensor:
    """Mark the entries of ``scores`` (out, in) that survive, by torch.topk; bool (out, in)."""
    if isinstance(pattern, NM):
        groups, count = scores.view(-1, pattern.m), pattern.n
    else:
        groups, count = scores.view(1, -1), pattern.kept((scores.shape[0], scores.shape[1]))
    kept = groups.topk(count, dim=1, sorted=False).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, kept, value=True).view(scores.shape)


@dataclass(frozen=True, slots=True)
class Run:
    """One solver on one case."""

    seconds: float
    objective: float
    iterations: int


@dataclass(frozen=True, slots=True)
class Case:
    """One layer with a pattern and a rank, solved in three ways; ``equal`` is None if no effort was enough."""

    layer: str
    shape: tuple[int, int]
    pattern: str
    rank: int
    plain: Run
    default: Run
    equal: Run | None
    effort: float | None

    def row(self) -> str:
        """One aligned line, under ``HEADER``."""
        equal = "not reached"
        if self.equal:
            faster = self.plain.seconds / self.equal.seconds
            equal = f"{self.effort:5g} {self.equal.seconds:7.2f} {self.equal.objective:9.6f} {faster:6.1f}x"
        out, columns = self.shape
        return (
            f"{self.layer:22} {f'{out}x{columns}':>11} {self.pattern:>5} {self.rank:4} |"
            f" {self.plain.seconds:7.2f} {self.plain.objective:9.6f} {self.plain.iterations:5} |"
            f" {self.default.seconds:7.2f} {self.default.objective:9.6f} {self.default.iterations:5}"
            f" {self.default.objective / self.plain.objective:6.3f} {self.plain.seconds / self.default.seconds:6.1f}x |"
            f" {equal}"
        )


HEADER = (
    f"{'':22} {'':11} {'':5} {'':4} | {'plain':23} | {'default':38} | equal quality\n"
    f"{'layer':22} {'shape':>11} {'keep':>5} {'rank':>4} | {'s':>7} {'objective':>9} {'steps':>5} |"
    f" {'s':>7} {'objective':>9} {'steps':>5} {'ratio':>6} {'faster':>7} | {'effort':>6} {'s':>6} {'objective':>9}"
    f" {'faster':>7}"
)


def compare(layer: str, W: Tensor, H: Tensor, pattern: Pattern, rank: int, repeats: int) -> Case:
    """Solve one case in the three ways."""
    algorithm, _ = find("3basil")
    gram = Gram.damped(H)
    W = W * ~gram.dead

    def measure(solver: Callable[[], Decomposition]) -> Run:
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            found = solver()
            seconds.append(time.perf_counter() - start)
        return Run(median(seconds), gram.relative_error(W, W - found.dense()), int(found.stats["iterations"]))

    def ours(options: dict[str, float]) -> Run:
        # a Gram of its own every time, so that nothing is left over from the run before
        return measure(lambda: solve(algorithm, W, Gram.damped(H), pattern, rank, options))

    plain, default = measure(lambda: plain_three_basil(W, Gram.damped(H), pattern, rank)), ours({})
    equal, effort = None, None
    for tried in LADDER:
        run = default if tried == algorithm.options["effort"].default else ours({"effort": tried})
        if run.objective <= plain.objective:
            equal, effort = run, tried
            break
    return Case(layer, (W.shape[0], W.shape[1]), str(pattern), rank, plain, default, equal, effort)


def summarise(cases: list[Case]) -> dict[str, dict[str, float]]:
    """Return geometric means for each pattern, and for all cases together."""
    patterns = dict.fromkeys(case.pattern for case in cases)
    return {p: _means([c for c in cases if c.pattern == p]) for p in patterns} | {"all": _means(cases)}


def _means(cases: list[Case]) -> dict[str, float]:
    return {
        "cases": len(cases),
        "cases_equal": sum(c.equal is not None for c in cases),
        "speedup_equal": geometric_mean(c.plain.seconds / c.equal.seconds for c in cases if c.equal),
        "speedup_default": geometric_mean(c.plain.seconds / c.default.seconds for c in cases),
        "objective_ratio_default": geometric_mean(c.default.objective / c.plain.objective for c in cases),
    }


def main() -> None:
    """Solve all cases, one line each, then the means."""
    parser = _parser()
    args = parser.parse_args()
    try:
        patterns = [parse_pattern(text) for text in args.patterns.split(",")]
        ranks = [int(text) for text in args.ranks.split(",")]
        names = args.layers.split(",") if args.layers else []
        layers = block_layers(
            args.model, args.block, corpus=args.corpus, samples=args.samples, seqlen=args.seqlen, layers=names
        )
        for name, (W, _) in layers.items():
            _check(name, W, patterns, ranks)
    except (InputError, ValueError) as error:
        parser.error(str(error))
    W, H = next(iter(layers.values()))
    for pattern in patterns:  # warm-up: threads, libraries, caches
        compare("warm-up", W[:CORNER, :CORNER], H[:CORNER, :CORNER], pattern, 8, 1)
    run_on = machine()
    print("  ".join(f"{key} {value}" for key, value in run_on.items()), HEADER, sep="\n", flush=True)
    cases: list[Case] = []
    for pattern in patterns:
        for rank in ranks:
            for name, (W, H) in layers.items():
                cases.append(compare(name, W, H, pattern, rank, args.repeats))
                print(cases[-1].row(), flush=True)
                if args.json:  # after every case: an interrupted run leaves what it has
                    write_json(args.json, _figures(cases, args, run_on))
    _print_summary(summarise(cases))


def _check(name: str, W: Tensor, patterns: list[Pattern], ranks: list[int]) -> None:
    shape = (W.shape[0], W.shape[1])
    for pattern in patterns:
        pattern.check(shape)
    wrong = [rank for rank in ranks if not 1 <= rank <= min(shape)]
    if wrong:
        raise InputError(f"Rank {wrong[0]} is not possible for {name} {shape}: give 1 to {min(shape)}.")


def _figures(cases: list[Case], args: argparse.Namespace, run_on: dict[str, Any]) -> dict[str, Any]:
    result = {"summary": summarise(cases), "cases": [asdict(case) for case in cases]}
    return {"version": 1, "machine": run_on, "arguments": vars(args), "ladder": LADDER, **result}


def _print_summary(summary: dict[str, dict[str, float]]) -> None:
    print("\nGeometric means:")
    for name, mean in summary.items():
        equal = f"{mean['speedup_equal']:.1f}x faster at an equal or lower objective"
        reached = f"({mean['cases_equal']} of {mean['cases']} cases)"
        print(
            f"{name:>5}: {equal} {reached}; at default effort {mean['speedup_default']:.1f}x faster, "
            f"objective {mean['objective_ratio_default']:.3f} times the plain one"
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", help="directory, hub id or .gguf file (default: the embedded small model)")
    parser.add_argument("--block", type=int, default=15)
    parser.add_argument("--corpus", default="builtin")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--patterns", default="2:4,0.5")
    parser.add_argument("--ranks", default="64,16")
    parser.add_argument("--repeats", type=int, default=1, help="the time is the median of so many solves")
    parser.add_argument("--layers", help="names or their last parts, such as q_proj,o_proj (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser


if __name__ == "__main__":
    main()
