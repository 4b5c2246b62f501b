"""Optimal brain surgery, one sweep over the columns: each is fixed in turn, and those to come make up for it.

With Aᵀ A = H⁻¹, A upper triangular, row j of A holds what is left of the inverse once the columns before j are fixed:
to change w_j by δ costs (δ / A_jj)², and is made good as far as possible by w_k ← w_k − (δ / A_jj) A_jk for all k > j.
What a column is fixed to, a caller says: zero where it is pruned, a point of a grid, or both.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from sparlow.linalg.gram import Gram
from sparlow.linalg.grid import GridValues
from sparlow.linalg.grid_target import GridTarget
from sparlow.linalg.rounding import Rounding
from sparlow.linalg.scales import searched

WIDTH = 128  # columns that are swept before the rest is updated, in one product

Fix = Callable[
    [Tensor, int, int], Tensor
]  # (T, j, stop) → what row j of T becomes; rows before ``stop`` are up to date


def sweep(T: Tensor, A: Tensor, fix: Fix, bounds: Sequence[int]) -> None:
    """Fix the rows of T (in, out), the transposed weight, in place, from the first to the last.

    Args:
        T: The weight in the coordinates of A, transposed: a column of it is a row here, in one piece of memory.
        A: Upper factor of the inverse (in, in).
        fix: Says what a row becomes.
        bounds: Where blocks begin, and the end of the last: after each the rest is updated in one product.
    """
    for start, stop in pairwise(bounds):
        errors = _sweep_block(T, A, fix, start, stop)
        T[stop:].addmm_(A[start:stop, stop:].T, errors, alpha=-1)


def _sweep_block(T: Tensor, A: Tensor, fix: Fix, start: int, stop: int) -> Tensor:
    """Fix the rows from ``start`` to before ``stop``, and return what each lost (stop − start, out), in A_jj."""
    scale = A.diagonal()[:, None]  # (in, 1)
    errors = T.new_empty(stop - start, T.shape[1])
    for j in range(start, stop):
        fixed = fix(T, j, stop)
        error = torch.div(T[j] - fixed, scale[j], out=errors[j - start])
        T[j] = fixed
        T[j + 1 : stop].addr_(A[j, j + 1 : stop], error, alpha=-1)
    return errors


def block_bounds(columns: int, width: int, group: int | None = None, unit: int = 1) -> list[int]:
    """Return where blocks of ``width`` columns begin, and the end of the last.

    A block also begins where a ``group`` of columns that shares a scale does, so that the scale is searched for columns
    that are up to date; but only where that is a multiple of ``unit``, the columns a pattern chooses among.
    """
    groups = (first for first in range(0, columns, group or columns) if first % unit == 0)
    return [*sorted({*range(0, columns, width), *groups}), columns]


class GridSweep:
    """Rounds rows of a sweep to a grid; the scales of a group are searched when the sweep reaches it.

    Args:
        gram: Of the inputs: the sweep goes in its unit-diagonal coordinates.
        rows: Rows of the weight.
        target: The grid.
        rounding: To its levels.
    """

    def __init__(self, gram: Gram, rows: int, target: GridTarget, rounding: Rounding) -> None:
        self.target, self.rounding, self.unit = target, rounding, gram.scale[:, None]
        self.columns, self.cost = len(gram.scale), saliency(gram)
        self.group = target.grid.group or self.columns
        self.scale = gram.scale.new_zeros(rows, target.grid.groups(self.columns))

    def begin(self, T: Tensor, first: int, keep: Tensor | None) -> None:
        """Search the scale of the group that begins at column ``first``, of what ``keep`` (group, out) keeps of T."""
        members = slice(first, min(first + self.group, self.columns))
        Z = T[members] / self.unit[members]
        Z = Z if keep is None else Z * keep
        self.scale[:, first // self.group] = searched(Z.T.contiguous(), self.cost[members], self.target, self.rounding)[
            :, 0
        ]

    def round_row(self, kept: Tensor, j: int) -> Tensor:
        """Return row j, ``kept`` (out,) in the sweep's coordinates and zero where it is pruned, rounded to the grid."""
        step = self.scale[:, j // self.group] * self.unit[j]
        return self.rounding(kept / torch.where(step == 0, 1.0, step)).mul_(step)

    def result(self, T: Tensor) -> tuple[Tensor, GridValues]:
        """Return S (out, in), exactly on the grid, and the grid, of a T (in, out) that was swept."""
        S = (T / self.unit).T.contiguous()
        step = self.target.steps(self.scale, self.columns)
        return self.rounding.to_grid(S, step, S), self.target.values(self.scale, self.rounding)


def saliency(gram: Gram) -> Tensor:
    """Return what a unit change of each column (in,) costs, once the columns after it have made up for it.

    An input that was always zero costs nothing.
    """
    return (gram.scale / gram.inverse_cholesky.diagonal()).square() * ~gram.dead


def swept_to_grid(
    T: Tensor, gram: Gram, mask: Tensor | None, target: GridTarget, rounding: Rounding
) -> tuple[Tensor, GridValues]:
    """Round T (out, in) to a grid, column by column, where ``mask`` (out, in) keeps it; None keeps all of it."""
    points = GridSweep(gram, len(T), target, rounding)
    X = (T * gram.scale).T.contiguous()
    keep = None if mask is None else mask.T.to(X.dtype)

    def fix(X: Tensor, j: int, stop: int) -> Tensor:
        del stop
        if j % points.group == 0:
            points.begin(X, j, None if keep is None else keep[j : j + points.group])
        return points.round_row(X[j] if keep is None else X[j] * keep[j], j)

    sweep(X, gram.inverse_cholesky, fix, block_bounds(T.shape[1], WIDTH, target.grid.group))
    return points.result(X)
