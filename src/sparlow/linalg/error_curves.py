"""How a layer's error falls with the rank of its low-rank part, by which an allocation by error compares layers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparlow.linalg.gram import Gram
from sparlow.linalg.grid import Grid
from sparlow.linalg.lowrank import random_factor, subspace_iteration
from sparlow.linalg.nearest import nearest
from sparlow.linalg.patterns import Pattern
from sparlow.linalg.tf32 import unit

STEPS = 6  # of subspace iteration; errors are then within a few tenths of a percent of those by a full SVD
SPARE = 8  # directions followed beyond the largest rank, as randomised SVDs do


def error_curve(W: Tensor, gram: Gram, pattern: Pattern, ranks: Sequence[int], grid: Grid | None = None) -> list[float]:
    """Relative errors that remain after pruning and the best low-rank part of each of the ``ranks``.

    The entries with the smallest |W_ij|·√H_jj are pruned, and the others are not updated. Solvers reach lower errors,
    but find the same layers hard.

    Args:
        W: Weight (out, in), float32.
        gram: Of its inputs (in, in).
        pattern: Of S.
        ranks: From 0 to min(out, in) each.
        grid: That the entries left are rounded to; None leaves them as they are.
    """
    T, G = W / unit(W) * gram.scale, gram.correlation
    whole = ((T @ G) * T).sum()
    if not whole:
        return [0.0 for _ in ranks]
    kept = T if grid is None else nearest(W / unit(W), grid) * gram.scale
    rest = T - kept * pattern.mask(T.abs())
    followed = min(max(ranks, default=0) + SPARE, *T.shape)
    _, V = subspace_iteration(rest, random_factor(followed, T), STEPS, G)
    # with an orthonormal U, the k largest squared singular values of rest in the metric are eigenvalues of V G Vᵀ
    explained = torch.linalg.eigvalsh((V @ G @ V.T).double()).flip(0).clamp_min(0)
    left = ((rest @ G) * rest).sum().double() - torch.cat((explained.new_zeros(1), explained.cumsum(0)))
    return [max(float(error), 0.0) for error in (left / whole.double())[list(ranks)]]
