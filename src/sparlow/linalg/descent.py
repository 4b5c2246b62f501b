"""Cyclic coordinate descent over the values of a grid, in a metric H."""

import torch
from torch import Tensor

from sparlow.linalg.grid_target import GridTarget
from sparlow.linalg.rounding import Rounding

BLOCK = 64  # columns that are visited before the rest is updated, in one product


def descend(
    S: Tensor, T: Tensor, H: Tensor, scale: Tensor, target: GridTarget, rounding: Rounding
) -> tuple[Tensor, Tensor]:
    """Lower tr((T − S) H (T − S)ᵀ) over the levels of S, one column after the other, where S is not pruned.

    With the others fixed, the error is a parabola in an entry, lowest at S_ij + ((T − S) H)_ij / H_jj. So the nearest
    level to that is the best, and no visit raises the error.

    Args:
        S: Where to start (out, in), on the grid; where entries are pruned, zero.
        T: What is approximated (out, in).
        H: The metric (in, in), of positive diagonal.
        scale: Of the groups (out, groups).
        target: The grid.
        rounding: To its levels.

    Returns:
        S (out, in) and what is left of the error of each row (out,).
    """
    columns, group = S.shape[1], target.grid.group or S.shape[1]
    Q = S.T.contiguous()  # (in, out): a column is a row here, in one piece of memory
    on = (Q != 0).to(Q.dtype) if target.masked else None
    steps = scale.T.contiguous()  # (groups, out)
    safe = torch.where(steps == 0, 1.0, steps)
    P = H @ (T - S).T  # (in, out) minus half the gradient
    diagonal = H.diagonal().tolist()
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        moves = Q.new_empty(stop - start, Q.shape[1])
        for j in range(start, stop):
            g = j // group
            z = torch.add(Q[j], P[j], alpha=1 / diagonal[j]).div_(safe[g])
            if on is not None:
                z.mul_(on[j])
            best = rounding(z).mul_(steps[g])
            torch.sub(best, Q[j], out=moves[j - start])
            Q[j] = best
            P[start:stop].addr_(H[start:stop, j], moves[j - start], alpha=-1)
        P[:start].addmm_(H[:start, start:stop], moves, alpha=-1)
        P[stop:].addmm_(H[stop:, start:stop], moves, alpha=-1)
    S = Q.T.contiguous()
    return S, torch.linalg.vecdot(P.T, T - S)
