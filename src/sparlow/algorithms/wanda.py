"""Wanda: pruning by weights and activations (Sun et al., 2023, arXiv 2306.11695).

    keep the largest |W_ij| · ‖X_j‖ = |W_ij| · √H_jj

Compared within each row for unstructured sparsity (the paper's section 3), within each group for N:M. The norms come
from the damped H, as for every method here.
"""

from torch import Tensor

from sparlow.algorithms._registry import pruner
from sparlow.linalg.gram import Gram
from sparlow.linalg.patterns import Pattern, within_rows


@pruner("wanda", usual=True, by_rows=True)
def wanda(W: Tensor, gram: Gram, pattern: Pattern) -> Tensor:
    """Keep the largest weight times input norm, row by row; move no weight."""
    return W * within_rows(pattern).mask(W.abs() * gram.scale)
