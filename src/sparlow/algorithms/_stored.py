"""What a solver found, as it is stored: values on their grid, in the weight's own units and type."""

from dataclasses import replace

import torch
from torch import Tensor

from sparlow.algorithms._results import Decomposition
from sparlow.errors import RunError
from sparlow.linalg.gram import Gram
from sparlow.linalg.grid import FactorScales, GridValues
from sparlow.linalg.grid_fit import Fit, fitted_to_grid, measured, rounded_fit
from sparlow.linalg.grid_target import GridTarget, Storage
from sparlow.linalg.lowrank import balanced
from sparlow.linalg.shared_rows import largest


def on_grid(W: Tensor, gram: Gram, found: Decomposition, target: GridTarget) -> Decomposition:
    """Return what was found with S on the grid, in the units of the solver.

    The grid is fitted to a result that is not on it. One that is on it is compared with plain rounding of what U V
    leaves, and the better of the two is returned.
    """
    if found.values is None:
        fit = fitted_to_grid(W, gram, found.S, found.U, found.V, target)
    else:
        own = Fit(found.S, found.values, found.U, found.V, found.factors, torch.inf)
        T = W - found.U @ found.V
        plain = rounded_fit(W, gram, T * (found.S != 0) if target.masked else T, own, target)
        fit = min(measured(W, gram, own), plain, key=lambda fit: fit.error)
    return Decomposition(fit.S, fit.U, fit.V, found.stats, fit.values, fit.factors)


def as_stored(found: Decomposition, dtype: torch.dtype, storage: Storage) -> Decomposition:
    """Return the result in the units and the type of the weight.

    Args:
        found: In the units of the solver.
        dtype: The weight's.
        storage: How parts are stored.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    U, V, S = found.U.to(wide), found.V.to(wide) * storage.unit, found.S.to(wide) * storage.unit
    values, factors = None, None
    if found.values is not None:
        values = _stored_values(found.values, storage)
        decoded = values.decode(values.encode(S))
        S = torch.where(S == 0, 0.0, decoded) if values.masked else decoded
    if found.factors is not None:
        scales = (found.factors.U, found.factors.V * storage.unit)
        factors = FactorScales(*(scale.to(storage.scales) for scale in scales))
    elif found.values is None:
        U, V = balanced(U, V)
    S, U, V = (part.to(dtype).contiguous() + 0.0 for part in (S, U, V))  # + 0.0: no negative zero
    return replace(found, S=S, U=U, V=V, values=values, factors=factors)


def _stored_values(values: GridValues, storage: Storage) -> GridValues:
    """Return the grid in the weight's units; RunError if its scales leave the range of their type."""
    scale, levels = (values.scale * storage.unit).to(storage.scales), values.levels.to(storage.scales)
    before, after = (largest(s.max().item() if s.numel() else 0.0) for s in (values.scale, scale))
    if before and not torch.finfo(storage.scales).tiny <= after < torch.inf:
        raise RunError(f"The scales of the grid do not fit {storage.scales}. Give the model in bfloat16 or float32.")
    return replace(values, scale=scale, levels=levels)


def off_grid(found: Decomposition) -> str | None:
    """Say in one sentence how S fails to lie on its grid exactly, or return None."""
    if found.values is None:
        return None
    exact = found.values.decode(found.values.encode(found.S)).to(found.S.dtype)
    same = (exact == found.S) | (found.S == 0 if found.values.masked else found.S != found.S)
    return None if bool(same.all()) else f"S has {int((~same).sum())} values that are not on the grid."
