"""What swapping kept against pruned entries gains after each method (SparseSwaps, arXiv 2512.10922).

    python benchmarks/mask_swaps.py --block 15 --patterns 2:4,0.5

In unit-diagonal coordinates, R = T − S − U V and g = R G: pruning s_p raises the error of a row by s_p² + 2 s_p g_p,
and bringing in q with its best value then lowers it by (g_q + s_p G_pq)². The best swap of every row is taken until
none lowers the error. Both columns end in the same refit (conjugate gradients on the support and the low-rank fit in
turns), so that the gain is that of the swaps alone. For N:M all pairs within a group are candidates, otherwise the
``CANDIDATES`` cheapest to prune and most promising to bring in.
"""

import argparse
import time
from dataclasses import dataclass

import torch
from _layers import block_layers, geometric_mean
from torch import Tensor

from sparlow.algorithms import Decomposition, find, solve
from sparlow.errors import InputError
from sparlow.linalg.conjugate_gradient import fit_on_support
from sparlow.linalg.gram import Gram
from sparlow.linalg.lowrank import subspace_step
from sparlow.linalg.patterns import NM, Pattern, parse_pattern

CANDIDATES = 16  # of each kind in a row, where the pattern has no groups
STEPS = 100  # swaps a row at most
REFITS, REFIT_STEPS = 5, 30  # alternations, conjugate-gradient steps in each
FLAT = 1e-9  # share of a row's error below which a swap gains nothing
METHODS = "wanda,sparsegpt,alps,3basil"


@dataclass(frozen=True)
class Pairs:
    """For every row one swap: entry p out, entry q in, and the change of the row's error."""

    p: Tensor
    q: Tensor
    change: Tensor


def best_in_groups(S: Tensor, g: Tensor, G: Tensor, m: int) -> Pairs:
    """The best swap of each row of S (out, in) among pairs of a group of m columns."""
    rows, columns = S.shape
    own = torch.stack([G[i : i + m, i : i + m] for i in range(0, columns, m)])  # (groups, m, m)
    s, h = S.view(rows, -1, m), g.view(rows, -1, m)
    change = (s * s + 2 * s * h)[..., None] - (h[:, :, None, :] + s[..., None] * own).square()
    kept = s != 0
    change.masked_fill_(~(kept[..., None] & ~kept[:, :, None, :]), torch.inf)
    best, index = change.view(rows, -1).min(1)
    first = index // (m * m) * m
    return Pairs(first + index % (m * m) // m, first + index % m, best)


def best_in_rows(S: Tensor, g: Tensor, G: Tensor) -> Pairs:
    """The best swap of each row of S (out, in) among its candidates."""
    kept = S != 0
    cost, out = (S * S + 2 * S * g).masked_fill(~kept, torch.inf).topk(CANDIDATES, dim=1, largest=False)
    back = (g * g).masked_fill(kept, -1).topk(CANDIDATES, dim=1).indices
    gain = g.gather(1, back)[:, None] + S.gather(1, out)[..., None] * G[out[..., None], back[:, None]]
    best, index = (cost[..., None] - gain.square()).view(len(S), -1).min(1)
    p = out.gather(1, (index // CANDIDATES)[:, None])[:, 0]
    return Pairs(p, back.gather(1, (index % CANDIDATES)[:, None])[:, 0], best)


def swapped(T: Tensor, S: Tensor, G: Tensor, pattern: Pattern) -> tuple[Tensor, float]:
    """Swap in T ≈ S (out, in) until no row gains; return S and the swaps a row."""
    S, g = S.clone(), (T - S) @ G
    smallest = FLAT * (g * (T - S)).sum(1)
    rows, count = torch.arange(len(S)), 0
    for _ in range(STEPS):
        found = best_in_groups(S, g, G, pattern.m) if isinstance(pattern, NM) else best_in_rows(S, g, G)
        gains = found.change < -smallest
        if not gains.any():
            break
        s = S[rows, found.p] * gains
        value = (g[rows, found.q] + s * G[found.p, found.q]) * gains
        S[rows, found.p] -= s
        S[rows, found.q] += value
        g += s[:, None] * G[found.p] - value[:, None] * G[found.q]
        count += int(gains.sum())
    return S, count / len(S)


def refitted(T: Tensor, S: Tensor, V: Tensor, G: Tensor) -> Tensor:
    """What remains of T (out, in) after least squares on the support of S in turns with the low-rank fit."""
    mask, L = S != 0, torch.zeros_like(T)
    for _ in range(REFITS):
        if len(V):
            U, V = subspace_step(T - S, G, V)
            L = U @ V
        S = fit_on_support(T - L, G, S, mask, REFIT_STEPS)
    return T - S - L


def measure(name: str, method: str, W: Tensor, gram: Gram, pattern: Pattern, rank: int) -> float:
    """Print a line for one layer and method; return the ratio of the errors with and without swaps."""
    algorithm, _ = find(method)
    rank = 0 if algorithm.kind == "pruner" else rank
    found: Decomposition = solve(algorithm, W, gram, pattern, rank, {})
    T, G, S, V = W * gram.scale, gram.correlation, found.S * gram.scale, found.V * gram.scale
    before = refitted(T, S, V, G)
    start = time.perf_counter()
    better, swaps = swapped(T - found.U @ V, S, G, pattern)
    seconds = time.perf_counter() - start
    after = refitted(T, better, V, G)
    errors = [gram.relative_error(W, R / gram.scale) for R in (before, after)]
    print(
        f"{name:20} {pattern!s:>5} {method:10} {found.stats['seconds']:6.1f} s {errors[0]:.6f} |"
        f" {seconds:6.1f} s {errors[1]:.6f}, {swaps:5.1f} swaps a row: {1 - errors[1] / errors[0]:7.2%}",
        flush=True,
    )
    return errors[1] / errors[0]


def main() -> None:
    """Measure every layer, pattern and method, then the means."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", help="directory, hub id or .gguf file (default: the embedded small model)")
    parser.add_argument("--block", type=int, default=15)
    parser.add_argument("--layers", default="q_proj,o_proj,gate_proj,down_proj")
    parser.add_argument("--patterns", default="2:4,0.5")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    try:
        layers = block_layers(
            args.model, args.block, corpus="builtin", samples=32, seqlen=512, layers=args.layers.split(",")
        )
        patterns = [parse_pattern(text) for text in args.patterns.split(",")]
    except InputError as error:
        parser.error(str(error))
    print(f"{'':37} method, refitted          | swaps, refitted")
    ratios: dict[str, list[float]] = {method: [] for method in args.methods.split(",")}
    for name, (W, H) in layers.items():
        for pattern in patterns:
            for method, found in ratios.items():
                found.append(measure(name, method, W, Gram.damped(H), pattern, args.rank))
    for method, found in ratios.items():
        print(f"{method:10}: error {geometric_mean(found):.4f} of that without swaps (geometric mean)")


if __name__ == "__main__":
    main()
