"""SparseGPT: one sweep of optimal brain surgery over the columns (Frantar and Alistarh, 2023, arXiv 2301.00774).

    minimise  tr((W − S) H (W − S)ᵀ)   s.t.  S on the pattern,  its columns fixed from left to right

The sweep and its factor A of H⁻¹ are those of ``linalg/sweep.py``. To prune w_j costs (w_j / A_jj)²; what is pruned is
chosen by that when the sweep reaches it (the paper's algorithm 1). Done in unit-diagonal coordinates, where all of this
reads the same.

With a grid, what is kept is rounded to it when its column is fixed, and the columns to come make up for that as well
(the paper's section 3.5). Where everything is kept, that is GPTQ (Frantar et al., 2023, arXiv 2210.17323).

Deviations from the papers:

* A comes from one factorisation of H read backwards, not from a factorisation of H⁻¹ (``Gram.inverse_cholesky``).
* Unstructured, each block of columns keeps its share of exactly what the pattern allows the whole matrix.
* A block ends where a group of an N:M pattern ends, so it may be narrower than ``blocksize``, or as wide as one group.
* With a grid and a mask, the result of a sweep without the grid, plainly rounded, is tried as well: a mask that was
  chosen with rounding on the way may be the worse one, above all where the grid is fine.
* The scale of a group of columns is searched over clipping; a book of levels is learned from the weight before the
  sweep.
"""

from torch import Tensor

from sparlow.algorithms._registry import Count, pruner
from sparlow.algorithms._results import Pruned
from sparlow.linalg.gram import Gram
from sparlow.linalg.grid_fit import rounded
from sparlow.linalg.grid_target import GridTarget
from sparlow.linalg.patterns import Pattern
from sparlow.linalg.scales import learned
from sparlow.linalg.shared_rows import summed
from sparlow.linalg.sweep import GridSweep, block_bounds, saliency, sweep


@pruner("sparsegpt", usual=True, by_rows=True)
def sparsegpt(
    W: Tensor, gram: Gram, pattern: Pattern, grid: GridTarget | None = None, *, blocksize: Count = 128
) -> Tensor | Pruned:
    """Prune column by column, and let the columns to come make up for it.

    Args:
        blocksize: Columns that are swept before the rest is updated, in one product; also those among which an
            unstructured pattern chooses at once.
    """
    columns, unit = W.shape[1], pattern.group
    group = unit or blocksize  # columns that are chosen among at once
    width = max(blocksize // group, 1) * group
    T = (W * gram.scale).T.contiguous()  # (in, out): a column of W is a row here, in one piece of memory
    choice = _Choice(gram.inverse_cholesky, pattern, group)
    if grid is None:
        sweep(T, gram.inverse_cholesky, choice, block_bounds(columns, width))
        return T.T.contiguous() / gram.scale
    cost = saliency(gram)
    likely = W * pattern.mask(W.square() * cost) if grid.masked else W
    points = GridSweep(gram, len(W), grid, learned(likely, cost, grid))

    def fix(T: Tensor, j: int, stop: int) -> Tensor:
        if j % points.group == 0:
            points.begin(T, j, choice.foreseen(T, j, points.group) if grid.masked else None)
        return points.round_row(choice(T, j, stop), j)

    sweep(T, gram.inverse_cholesky, fix, block_bounds(columns, width, grid.grid.group, unit or 1))
    found = points.result(T)
    if grid.masked:
        pruned = Pruned.of(sparsegpt(W, gram, pattern, blocksize=blocksize))
        plain = rounded(pruned.S, grid)
        found = min(found, plain, key=lambda part: summed(gram.objective(W - part[0]).item()))
    return Pruned(found[0], values=found[1])


class _Choice:
    """Keeps the entries that cost most to prune, chosen when the sweep reaches the first column of a group.

    Args:
        A: Factor of the inverse (in, in), upper.
        pattern: Says how many.
        group: Columns that are chosen among at once.
    """

    def __init__(self, A: Tensor, pattern: Pattern, group: int) -> None:
        self.scale, self.pattern, self.group = A.diagonal()[:, None], pattern, group
        self.members = slice(0, 0)  # columns that were chosen among last

    def __call__(self, T: Tensor, j: int, stop: int) -> Tensor:
        """Return row j of T (in, out), zero where it is pruned."""
        if j == self.members.stop:
            self.members = slice(j, min(j + self.group, stop))
            self.keep = self._chosen(T, self.members)
        kept: Tensor = T[j] * self.keep[j - self.members.start]
        return kept

    def foreseen(self, T: Tensor, first: int, columns: int) -> Tensor:
        """Return what would be kept (columns, out) of the columns from ``first`` on as they are now."""
        unit = self.pattern.group or 1
        begin, end = first // unit * unit, min(-(-(first + columns) // unit) * unit, len(T))
        return self._chosen(T, slice(begin, end))[first - begin : first - begin + columns]

    def _chosen(self, T: Tensor, members: slice) -> Tensor:
        scores = (T[members] / self.scale[members]).square()  # (group, out)
        return self.pattern.mask_of_columns(scores.T, members.start, T.shape[0]).T.to(T.dtype)
