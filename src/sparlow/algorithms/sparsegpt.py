"""SparseGPT: one sweep of optimal brain surgery over the columns (Frantar and Alistarh, 2023, arXiv 2301.00774).

    minimise  tr((W − S) H (W − S)ᵀ)   s.t.  S on the pattern,  its columns fixed from left to right

With Aᵀ A = H⁻¹, A upper triangular, row j of A holds what is left of the inverse once the columns before j are fixed:
to prune w_j costs (w_j / A_jj)², and is made good as far as possible by w_k ← w_k − (w_j / A_jj) A_jk for all k > j
(the paper's algorithm 1). Done in unit-diagonal coordinates, where all of this reads the same.

Deviations from the paper:

* A comes from one factorisation of H read backwards, not from a factorisation of H⁻¹ (``Gram.inverse_cholesky``).
* Unstructured, each block of columns keeps its share of exactly what the pattern allows the whole matrix.
* A block ends where a group of an N:M pattern ends, so it may be narrower than ``blocksize``, or as wide as one group.
"""

import torch
from torch import Tensor

from sparlow.algorithms._registry import Count, pruner
from sparlow.linalg.gram import Gram
from sparlow.linalg.patterns import Pattern


@pruner("sparsegpt")
def sparsegpt(W: Tensor, gram: Gram, pattern: Pattern, *, blocksize: Count = 128) -> Tensor:
    """Prune column by column, and let the columns to come make up for it.

    Args:
        blocksize: Columns that are swept before the rest is updated, in one product; also those among which an
            unstructured pattern chooses at once.
    """
    A, columns = gram.inverse_cholesky, W.shape[1]
    group = pattern.group or blocksize  # columns that are chosen among at once
    width = max(blocksize // group, 1) * group
    T = (W * gram.scale).T.contiguous()  # (in, out): a column of W is a row here, in one piece of memory
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        errors = _sweep(T, A, pattern, group, start, stop)
        T[stop:].addmm_(A[start:stop, stop:].T, errors, alpha=-1)
    return T.T.contiguous() / gram.scale


def _sweep(T: Tensor, A: Tensor, pattern: Pattern, group: int, start: int, stop: int) -> Tensor:
    """Prune the columns from ``start`` to before ``stop``, in place; leave those from ``stop`` on as they are.

    Args:
        T: The weight, transposed (in, out).
        A: Factor of the inverse (in, in), upper.
        pattern: Chooses when the sweep reaches a group.
        group: Columns that are chosen among at once.
        start: First column of the block.
        stop: First column of the next.

    Returns:
        What every column lost, in units of A_jj (stop − start, out).
    """
    scale = A.diagonal()[:, None]  # (in, 1)
    errors = T.new_empty(stop - start, T.shape[1])
    for j in range(start, stop):
        place = (j - start) % group
        if place == 0:
            members = slice(j, min(j + group, stop))
            scores = (T[members] / scale[members]).square()  # (group, out)
            keep = pattern.mask_of_columns(scores.T, j, T.shape[0]).T.to(T.dtype)
        kept = T[j] * keep[place]
        error = torch.div(T[j] - kept, scale[j], out=errors[j - start])
        T[j] = kept
        T[j + 1 : stop].addr_(A[j, j + 1 : stop], error, alpha=-1)
    return errors
