"""EoRA: a low-rank part that makes up for what pruning lost (Liu et al., 2024, arXiv 2410.21271).

    S = prune(W),    minimise  tr((W − S − L) H (W − S − L)ᵀ)  over  L = U V of rank ≤ r

Deviation from the paper: its eigenvectors of H, scaled by the roots of their eigenvalues, are one of many R with
R Rᵀ = H. All give the same L, so the Cholesky factor of H serves (``weighted_svd``).

Several processes do not share the rows of a weight: the SVD is of all of them, and takes longer than most pruners.
"""

from torch import Tensor

from sparlow.algorithms._registry import Pruner, decomposer
from sparlow.algorithms._results import Decomposition, Pruned
from sparlow.algorithms.sparsegpt import sparsegpt
from sparlow.linalg.gram import Gram
from sparlow.linalg.lowrank import weighted_svd
from sparlow.linalg.patterns import Pattern


@decomposer("eora", aliases={"eora_sparsegpt": {"prune": "sparsegpt"}, "eora_alps": {"prune": "alps"}})
def eora(W: Tensor, gram: Gram, pattern: Pattern, rank: int, *, prune: Pruner = sparsegpt) -> Decomposition:
    """Prune, then fit the low-rank part to what is missing, once.

    Args:
        prune: Finds S.
    """
    pruned = Pruned.of(prune(W, gram, pattern))
    U, V = weighted_svd(W - pruned.S, gram, rank)
    return Decomposition(pruned.S, U, V, pruned.stats)
