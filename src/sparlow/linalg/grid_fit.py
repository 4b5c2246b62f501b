"""From S, U and V to what is stored: S on a grid, U and V as they are stored, each the best for the others.

minimise  tr((W − S − U V) H (W − S − U V)ᵀ)   s.t.  S on the pattern and on the grid,  U V of rank ≤ r
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparlow.linalg.descent import descend
from sparlow.linalg.factors import stored_factors
from sparlow.linalg.gram import Gram
from sparlow.linalg.grid import FactorScales, GridValues
from sparlow.linalg.grid_target import GridTarget
from sparlow.linalg.lowrank import subspace_iteration
from sparlow.linalg.scales import learned, least_squares, unclipped
from sparlow.linalg.shared_rows import summed
from sparlow.linalg.sweep import saliency, swept_to_grid

ROUNDS = 2  # of low rank, scales and descent; a third gains less than 1 %
SUBSPACE_STEPS = 3  # of the low-rank fit in each
DEAD = 1e-6  # of the mean of the diagonal: the metric of an input that was always zero


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """Parts that are stored, in the units of a solver.

    Attributes:
        S: On the grid (out, in).
        values: The grid.
        U: Left factor (out, r).
        V: Right factor (r, in).
        factors: Scales of U and V in int8; None if they are stored in the type of the weight.
        error: tr(R H Rᵀ) with R = W − S − U V, inputs that were always zero left out.
    """

    S: Tensor
    values: GridValues
    U: Tensor
    V: Tensor
    factors: FactorScales | None
    error: float


def fitted_to_grid(W: Tensor, gram: Gram, S: Tensor, U: Tensor, V: Tensor, target: GridTarget) -> Fit:
    """Put any S on a grid, its support fixed: by a sweep over the columns or by plain rounding, then ``finished``.

    Of the two the better is taken: a sweep begins anew from W, which pays unless the grid is fine. So the result is
    never worse than plain rounding.

    Args:
        W: The weight (out, in).
        gram: Of its inputs.
        S: The sparse part found (out, in), of any values.
        U: Left factor (out, r).
        V: Right factor (r, in).
        target: The grid.
    """
    mask = S != 0 if target.masked else None
    start = stored(W, gram, rounded(S, target), U, V, target)
    swept = swept_fit(W, gram, mask, start, target)
    return finished(W, gram, min(start, swept, key=lambda fit: fit.error), target)


def swept_fit(W: Tensor, gram: Gram, mask: Tensor | None, fit: Fit, target: GridTarget) -> Fit:
    """Return the fit whose S comes from a sweep over what U V leaves, its factors those of ``fit``."""
    T = W - fit.U @ fit.V
    kept = T if mask is None else T * mask
    rounding = learned(kept, saliency(gram), target)
    S, values = swept_to_grid(T, gram, mask, target, rounding)
    return measured(W, gram, replace(fit, S=S, values=values))


def rounded_fit(W: Tensor, gram: Gram, S: Tensor, fit: Fit, target: GridTarget) -> Fit:
    """Return the fit of an S that is plainly rounded, its factors those of ``fit``."""
    S, values = rounded(S, target)
    return measured(W, gram, replace(fit, S=S, values=values))


def rounded(S: Tensor, target: GridTarget) -> tuple[Tensor, GridValues]:
    """Round S (out, in) to the nearest points of a grid that clips nothing; a book has plain levels here."""
    rounding = target.rounding()
    scale = target.storage.scale(unclipped(S, target, rounding))
    return rounding.to_grid(S, target.steps(scale, S.shape[1]), torch.empty_like(S)), target.values(scale, rounding)


def stored(W: Tensor, gram: Gram, S: tuple[Tensor, GridValues], U: Tensor, V: Tensor, target: GridTarget) -> Fit:
    """Return the fit of S, its grid, and factors near U and V."""
    U, V, factors = stored_factors(W - S[0], metric(gram), U, V, target.storage, int8=target.int8_factors)
    return measured(W, gram, Fit(*S, U, V, factors, torch.inf))


def finished(W: Tensor, gram: Gram, fit: Fit, target: GridTarget) -> Fit:
    """Fit the factors, the scales and the values in turns, each given the others, and return the best.

    A round ends on the values, so that S answers the factors as they are stored.
    """
    H, rounding = metric(gram), target.rounding(magnitudes(fit.values))
    best = fit
    for _ in range(ROUNDS):
        U, V, factors = fit.U, fit.V, fit.factors
        if len(V):
            M = W - fit.S
            U, V = subspace_iteration(M * gram.scale, V * gram.scale, SUBSPACE_STEPS, gram.correlation)
            U, V, factors = stored_factors(M, H, U, V / gram.scale, target.storage, int8=target.int8_factors)
        T, scale = W - U @ V, fit.values.scale
        step = target.steps(scale, W.shape[1])
        C = rounding(fit.S / torch.where(step == 0, 1.0, step))
        scale = least_squares(C, T, H, scale, target)
        S = C * target.steps(scale, W.shape[1])
        S, errors = descend(S, T, H, scale, target, rounding)
        fit = Fit(S, target.values(scale, rounding), U, V, factors, summed(errors.sum().item()))
        best = fit if fit.error < best.error else best
    return best


def magnitudes(values: GridValues) -> Tensor | None:
    """Return the magnitudes of a book; None of plain levels."""
    return values.levels[len(values.levels) // 2 :] if values.grid.levels == "book" else None


def measured(W: Tensor, gram: Gram, fit: Fit) -> Fit:
    """Return the fit with its error."""
    R = W - fit.S - fit.U @ fit.V
    return replace(fit, error=summed(((R @ metric(gram)) * R).sum().item()))


def metric(gram: Gram) -> Tensor:
    """Return H (in, in) in which an input that was always zero counts as next to nothing."""
    if not gram.dead.any():
        return gram.H
    H = gram.H.clone()
    live = H.diagonal()[~gram.dead]
    H.diagonal()[gram.dead] = DEAD * (live.mean() if len(live) else 1.0)
    return H
