"""Least squares on a fixed support, by conjugate gradients."""

import torch
from torch import Tensor

FLAT = 1e-6  # a curvature below this, where the diagonal has mean 1, is only rounding


def fit_on_support(target: Tensor, G: Tensor, S: Tensor, mask: Tensor, steps: int) -> Tensor:
    """Lower tr((T − S) G (T − S)ᵀ) over the entries of S where ``mask`` is True; the rest stays zero.

    The rows are independent problems that share G. Each has its own step lengths, and all advance together with one
    product with G in each step. After enough steps this equals ``lstsq`` row by row.

    Args:
        target: T (out, in).
        G: Metric (in, in), symmetric positive semi-definite. Its diagonal is near 1, so no preconditioner is needed.
        S: Where to start (out, in), zero outside the mask.
        mask: The support (out, in), bool.
        steps: Conjugate-gradient steps.

    Returns:
        S (out, in), zero outside the mask.
    """
    tiny = torch.finfo(S.dtype).tiny
    on = mask.to(S.dtype)  # a product with floats is five times as fast as one with bools
    r = ((target - S) @ G).mul_(on)  # minus half the gradient
    S, p, Gp = S.clone(), r.clone(), torch.empty_like(r)  # written into from here on: new memory costs more than sums
    rs = _dots(r, r)
    for _ in range(steps):
        torch.mm(p, G, out=Gp).mul_(on)
        curvature = _dots(p, Gp)
        flat = curvature <= FLAT * _dots(p, p)  # a direction in which G is singular: stay
        step = torch.where(flat, 0.0, rs / curvature.clamp_min(tiny))
        S.addcmul_(step, p)
        r.addcmul_(step, Gp, value=-1)
        previous, rs = rs, _dots(r, r)
        p.mul_(rs / previous.clamp_min(tiny)).add_(r)
    return S


def _dots(A: Tensor, B: Tensor) -> Tensor:
    """The inner product of every row of A with that of B (out, in), as (out, 1)."""
    dots: Tensor = torch.linalg.vecdot(A, B)
    return dots[:, None]
