"""HASSLE-free: pruning and the low-rank fit in turns (Makni et al., 2025, arXiv 2502.00899).

    minimise  tr((W − S − L) H (W − S − L)ᵀ)   s.t.  S on the pattern,  L = U V of rank ≤ r

    S ← prune(W − L),    L ← the best fit of rank r to W − S in the norm of H

Deviation from the paper: L is exact in the last round only. Before, S moves little from round to round, and a few steps
of subspace iteration from the round before stand in for the SVD; the objective ends about 1 % higher for it.

Every round prunes from scratch, as in the paper. To start the ADMM of ``prune`` from the S of the round before was
tried and left: from the same ρ it takes as many iterations, for at a low ρ the start is soon forgotten, and from a ρ
two to five times as high it takes half as many but ends up to 50 % higher. What depends on H alone the Gram keeps.
"""

from torch import Tensor

from sparlow.algorithms._registry import Count, Decomposition, Pruner, decomposer
from sparlow.algorithms.alps import alps
from sparlow.linalg.gram import Gram
from sparlow.linalg.lowrank import random_factor, subspace_iteration, weighted_svd
from sparlow.linalg.patterns import Pattern

SUBSPACE_STEPS = 4  # a round; 1 leaves the objective 2 % higher


@decomposer(
    "hassle-free", aliases={"hassle-free-alps": {"prune": "alps"}, "hassle-free-sparsegpt": {"prune": "sparsegpt"}}
)
def hassle_free(
    W: Tensor, gram: Gram, pattern: Pattern, rank: int, *, prune: Pruner = alps, rounds: Count = 80
) -> Decomposition:
    """Alternate pruning and the low-rank fit, each given the other's result.

    Args:
        prune: Finds S.
        rounds: Alternations; of no use without a low-rank part.
    """
    T, G, rounds = W * gram.scale, gram.correlation, rounds if rank else 1
    V = random_factor(rank, T)
    S = prune(W, gram, pattern)
    for _ in range(rounds - 1):
        U, V = subspace_iteration(T - S * gram.scale, V, SUBSPACE_STEPS, G)
        S = prune(W - U @ V / gram.scale, gram, pattern)
    U, V = weighted_svd(W - S, gram, rank)
    return Decomposition(S, U, V, {"iterations": rounds})
