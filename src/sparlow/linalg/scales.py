"""Scales of groups: a search over clipping, what nothing but rounding would take, and least squares in a metric H.

Z (out, in) is in the order and the units of the weight, and zero where it is pruned. A group is ``group`` consecutive
columns of a row; the last of a row may be shorter.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparlow.linalg.grid_target import GridTarget
from sparlow.linalg.portions import portion
from sparlow.linalg.rounding import Rounding, learn_magnitudes, row_blocks, whole_magnitudes
from sparlow.linalg.shared_rows import of_first, sampled

CANDIDATES = 10  # scales tried for a group, from clipping to the largest entry
LEAST_SHARE = {2: 0.3, 3: 0.3, 4: 0.45, 8: 0.7}  # of the largest entry: where the search begins, by bits
NEARBY = (0.88, 0.94, 1.06, 1.13)  # factors tried of a scale that is known well already
BOOK_ROWS = 192  # rows that a book is learned from
BOOK_ROUNDS = 3  # of learning a book for given scales, then scales for the book
FEWEST_COLUMNS = 8  # of a group whose scales are fitted by least squares: of fewer, a row has too many unknowns
NORMAL_EQUATIONS = 2**24  # numbers of them that are made at a time
BYTE = 8  # bits of a grid whose levels would be too many for distinct integers of a byte on both sides of zero
RIDGE = 1e-6  # of their diagonal: what keeps a scale that nothing depends on as it is


def grouped(Z: Tensor, group: int | None) -> Tensor:
    """Return Z (out, in) as (out, groups, group), filled up with zeros."""
    width = group or max(Z.shape[1], 1)
    return pad(Z, (0, -Z.shape[1] % width)).view(len(Z), -1, width)


def unclipped(Z: Tensor, target: GridTarget, rounding: Rounding) -> Tensor:
    """Return the scales (out, groups) at which the largest entry of a group has the largest level."""
    return grouped(Z, target.grid.group).abs().amax(2) / rounding.top


def searched(Z: Tensor, weight: Tensor, target: GridTarget, rounding: Rounding) -> Tensor:
    """Return the scales (out, groups), as stored, with the least Σ weight (Z − s q(Z / s))² of several clippings.

    Args:
        Z: Numbers (out, in).
        weight: Of each column (in,).
        target: The grid.
        rounding: To its levels.
    """
    whole, least = unclipped(Z, target, rounding), LEAST_SHARE[target.grid.bits]
    shares = [1 - (1 - least) * k / (CANDIDATES - 1) for k in range(CANDIDATES)]
    return best_of(Z, weight, target, rounding, (whole * share for share in shares))


def followed(Z: Tensor, weight: Tensor, target: GridTarget, rounding: Rounding, scale: Tensor) -> Tensor:
    """Return the best scales (out, groups) beside ``scale``, which is one of the candidates; as ``searched``."""
    return best_of(Z, weight, target, rounding, (scale, *(scale * factor for factor in NEARBY)))


def best_of(Z: Tensor, weight: Tensor, target: GridTarget, rounding: Rounding, candidates: Iterable[Tensor]) -> Tensor:
    """Return, of each group, the candidate (out, groups) with the least weighted error, as stored."""
    parts, weights = grouped(Z, target.grid.group), grouped(weight[None], target.grid.group)[0]
    stored = [target.storage.scale(scale) for scale in candidates]
    found = torch.empty_like(stored[0])
    for rows in row_blocks(Z):
        best = parts.new_full((), torch.inf).expand_as(found[rows])
        chosen = stored[0][rows]
        for scale in stored:
            error = _errors(parts[rows], weights, scale[rows], rounding)
            better = error < best
            best, chosen = torch.where(better, error, best), torch.where(better, scale[rows], chosen)
        found[rows] = chosen
    return found


def _errors(parts: Tensor, weights: Tensor, scale: Tensor, rounding: Rounding) -> Tensor:
    """Return Σ weight (Z − s q(Z / s))² of each group (rows, groups) for Z (rows, groups, group)."""
    z = parts / torch.where(scale == 0, 1.0, scale)[..., None]
    lost = rounding(z).sub_(z).square_()
    error: Tensor = torch.linalg.vecdot(lost, weights).mul_(scale.square())
    return error.masked_fill_(scale == 0, torch.inf)  # too small to be stored, or of a group of zeros


def learned(Z: Tensor, weight: Tensor, target: GridTarget) -> Rounding:
    """Return the rounding to a book that suits Z (out, in), learned from some rows; to plain levels of other grids.

    Up to four bits, its levels are integers of a byte times one number, so that a kernel multiplies bytes; measured on
    weights of a model and random ones, the error rises by 0.3 % at most.

    Args:
        Z: Numbers (out, in).
        weight: Of each column (in,).
        target: The grid.
    """
    rounding = target.rounding()
    if target.grid.levels != "book":
        return rounding
    rows = sampled(Z, portion(BOOK_ROWS))
    scale = searched(rows, weight, target, rounding)
    if not scale.any():
        return rounding
    for _ in range(BOOK_ROUNDS):
        step = target.steps(scale, Z.shape[1])
        counts = (step > 0) if not target.masked else (step > 0) & (rows != 0)
        z, w = rows / torch.where(step == 0, 1.0, step), step.square() * weight * counts
        rounding = target.rounding(learn_magnitudes(z, w, rounding.magnitudes))
        scale = followed(rows, weight, target, rounding, scale)
    found = of_first(rounding.magnitudes if target.grid.bits == BYTE else whole_magnitudes(rounding.magnitudes))
    return target.rounding(found)


def least_squares(C: Tensor, T: Tensor, H: Tensor, scale: Tensor, target: GridTarget) -> Tensor:
    """Return the scales (out, groups), as stored, with the least tr((T − s C) H (T − s C)ᵀ) for fixed levels.

    The rows are independent: with C_g the levels of group g of a row, N s = b for N_gk = C_g H_gk C_kᵀ and
    b_g = (T H)_g C_gᵀ. A scale that would not be positive is left as it is.

    Args:
        C: The level of every entry (out, in), zero where it is pruned.
        T: What is approximated (out, in).
        H: The metric (in, in).
        scale: The scales now (out, groups).
        target: The grid.
    """
    groups, width = scale.shape[1], target.grid.group or C.shape[1]
    if width < FEWEST_COLUMNS:
        return scale
    step, found = target.steps(scale, C.shape[1]), torch.empty_like(scale)
    rows = max(NORMAL_EQUATIONS // groups**2, 1)
    for start in range(0, len(C), rows):
        part = slice(start, start + rows)
        N, b = _normal_equations(C[part], T[part] - C[part] * step[part], H, groups, width)
        diagonal = N.diagonal(dim1=1, dim2=2)
        diagonal += RIDGE * diagonal.mean(1, keepdim=True) + torch.finfo(N.dtype).tiny
        found[part] = scale[part] + torch.linalg.solve_ex(N, b).result
    found = target.storage.scale(found)
    return torch.where((found > 0) & found.isfinite() & (scale > 0), found, scale)


def _normal_equations(C: Tensor, R: Tensor, H: Tensor, groups: int, width: int) -> tuple[Tensor, Tensor]:
    """Return N (rows, groups, groups) and b (rows, groups) of the change of the scales for a residual R (rows, in)."""
    N = C.new_zeros(len(C), groups, groups)
    b = grouped((R @ H).mul_(C), width).sum(2)
    for g in range(groups):
        members = slice(g * width, (g + 1) * width)
        begin = members.start  # N is symmetric: groups before this one are known
        pairs = grouped((C[:, members] @ H[members, begin:]).mul_(C[:, begin:]), width).sum(2)
        N[:, g, g:] = pairs
        N[:, g:, g] = pairs
    return N, b
