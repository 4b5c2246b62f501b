"""U and V as they are stored: in int8, or in the type of the weight."""

import torch
from torch import Tensor

from sparlow.linalg.coordinates import cholesky
from sparlow.linalg.grid import FactorScales
from sparlow.linalg.grid_target import Storage
from sparlow.linalg.lowrank import balanced
from sparlow.linalg.shared_rows import maximum

LARGEST = 127  # in int8; −128 is not used


def stored_factors(
    M: Tensor, H: Tensor, U: Tensor, V: Tensor, storage: Storage, *, int8: bool
) -> tuple[Tensor, Tensor, FactorScales | None]:
    """Return U (out, r) and V (r, in) near those given, as they will be read, with their scales if in int8.

    There are no scales of no factors. V is rounded first; U then follows by least squares in the metric H, which makes
    good for a part of that, and is rounded too.

    Args:
        M: What U V approximates (out, in).
        H: The metric (in, in).
        U: Left factor (out, r).
        V: Right factor (r, in).
        storage: How parts are stored.
        int8: Whether the factors are in int8, V by rows and U by columns.
    """
    if not len(V):
        return U, V, None
    U, V = _even(U, V, storage.unit) if int8 else _balanced(U, V, storage.unit)
    if not int8:
        V = storage.rounded(V, storage.weight, storage.unit)
        return storage.rounded(fitted_left(M, H, V), storage.weight), V, None
    V, scale_V = _int8(V, 1, storage, storage.unit)
    U, scale_U = _int8(fitted_left(M, H, V), 0, storage, 1.0)
    return U, V, FactorScales(scale_U, scale_V)


def fitted_left(M: Tensor, H: Tensor, V: Tensor) -> Tensor:
    """Return U (out, r) = M H Vᵀ (V H Vᵀ)⁻¹, the best for a given V; zero where V has a row of zeros."""
    HV = H @ V.T  # (in, r)
    N = V @ HV
    size = N.diagonal().clamp_min(0).sqrt()
    inverse = torch.where(size > 0, 1 / size, 0.0)
    N = N * inverse * inverse[:, None]
    N.diagonal().copy_(torch.ones_like(size))
    factor, _ = cholesky(N, "what the right factors share")
    return torch.cholesky_solve((M @ HV * inverse).T, factor).T * inverse


def _int8(X: Tensor, dim: int, storage: Storage, unit: float) -> tuple[Tensor, Tensor]:
    """Return X rounded to 127 steps each way of a scale for each row or column, and the scales."""
    top = X.abs().amax(dim, keepdim=True)
    top = top if dim else maximum(top)  # a column of U has rows in every process
    scale = storage.rounded(top / LARGEST, storage.scales, unit)
    codes = (X / torch.where(scale == 0, 1.0, scale)).round_().clamp_(-LARGEST, LARGEST)
    return codes * scale, scale.flatten()


def _balanced(U: Tensor, V: Tensor, unit: float) -> tuple[Tensor, Tensor]:
    U, V = balanced(U, V * unit)
    return U, V / unit


def _even(U: Tensor, V: Tensor, unit: float) -> tuple[Tensor, Tensor]:
    """Move powers of two between U and V · unit until their entries are about the same size."""
    u, v = maximum(U.abs().amax(0)).log2(), (V.abs() * unit).amax(1).log2()
    shift = torch.where((u + v).isfinite(), ((v - u) / 2).round(), 0.0).exp2()
    return U * shift, V / shift[:, None]
