"""HASSLE-free: pruning and the low-rank fit in turns (Makni et al., 2025, arXiv 2502.00899).

    minimise  tr((W − S − L) H (W − S − L)ᵀ)   s.t.  S on the pattern,  L = U V of rank ≤ r

    S ← prune(W − L),    L ← the best fit of rank r to W − S in the norm of H

Deviations from the paper: what a round finds the next one corrects, so both steps are exact in the last round only.
Before, a few steps of subspace iteration from the round before stand in for the SVD, which leaves the objective about
1 % higher; and a pruner that iterates stops early, which after 40 rounds leaves it up to 2 % higher in 0.6 of the time.

Every round prunes from scratch, as in the paper. To start the ADMM of ``prune`` from the S of the round before was
tried and left: from the same ρ it takes as many iterations, for at a low ρ the start is soon forgotten, and from a ρ
two to five times as high it takes half as many but ends up to 50 % higher. What depends on H alone the Gram keeps.

Several processes can share the rows of a weight: nearly all of the work is in the pruning, which ``prune`` must be able
to do by rows. The SVD at the end is of all rows, and each process computes it.
"""

import functools
import inspect

from torch import Tensor

from sparlow.algorithms._registry import Count, Pruner, decomposer
from sparlow.algorithms._results import Decomposition, Pruned, SolveStats
from sparlow.algorithms.alps import alps
from sparlow.linalg.gram import Gram
from sparlow.linalg.lowrank import random_factor, subspace_iteration, weighted_svd
from sparlow.linalg.patterns import Pattern

SUBSPACE_STEPS = 4  # a round; 1 leaves the objective 2 % higher


@decomposer(
    "hassle-free",
    aliases={"hassle-free-alps": {"prune": "alps"}, "hassle-free-sparsegpt": {"prune": "sparsegpt"}},
    by_rows=True,
)
def hassle_free(
    W: Tensor,
    gram: Gram,
    pattern: Pattern,
    rank: int,
    *,
    prune: Pruner = alps,
    rounds: Count = 80,
    prune_steps: Count = 20,
) -> Decomposition:
    """Alternate pruning and the low-rank fit, each given the other's result.

    Args:
        prune: Finds S.
        rounds: Alternations; of no use without a low-rank part.
        prune_steps: Bound on the iterations of a pruner that has ``max_steps``, in all rounds but the last.
    """
    rough = prune
    if "max_steps" in inspect.signature(prune).parameters:
        rough = functools.partial(prune, max_steps=prune_steps)  # type: ignore[call-arg]  # it was just looked up
    T, G, rounds = W * gram.scale, gram.correlation, rounds if rank else 1
    V = random_factor(rank, T)
    pruned = Pruned.of((rough if rounds > 1 else prune)(W, gram, pattern))
    steps = pruned.stats.iterations
    for left in reversed(range(rounds - 1)):
        U, V = subspace_iteration(T - pruned.S * gram.scale, V, SUBSPACE_STEPS, G)
        pruned = Pruned.of((rough if left else prune)(W - U @ V / gram.scale, gram, pattern))
        steps += pruned.stats.iterations
    U, V = weighted_svd(W - pruned.S, gram, rank)
    return Decomposition(pruned.S, U, V, SolveStats(steps, pruned.stats.converged, more={"rounds": rounds}))
