"""Least squares on a fixed support, by conjugate gradients."""

import torch
from torch import Tensor

FLAT = 1e-6  # curvature, relative to that of a unit diagonal, below which rounding decides


def fit_on_support(target: Tensor, G: Tensor, S: Tensor, mask: Tensor, steps: int) -> Tensor:
    """Lower tr((T − S) G (T − S)ᵀ) over the entries of S where ``mask`` is True; the rest stays zero.

    The rows are independent problems that share G; each has its own step lengths, all advance together, one product
    with G a step. Equivalent, after enough steps, to ``lstsq`` row by row.

    Args:
        target: T (out, in).
        G: Metric (in, in), symmetric positive semi-definite, best of unit diagonal (then no preconditioner is needed).
        S: Where to start (out, in), zero outside the mask.
        mask: The support (out, in), bool.
        steps: Conjugate-gradient steps.

    Returns:
        S (out, in), zero outside the mask.
    """
    tiny = torch.finfo(S.dtype).tiny
    r = ((target - S) @ G) * mask  # minus half the gradient
    p, rs = r, (r * r).sum(1, keepdim=True)  # rs (out, 1)
    for _ in range(steps):
        Gp = (p @ G) * mask
        curvature = (p * Gp).sum(1, keepdim=True)
        flat = curvature <= FLAT * (p * p).sum(1, keepdim=True)  # a direction in which G is singular: stay
        step = torch.where(flat, 0.0, rs / curvature.clamp_min(tiny))
        S = S + step * p
        r = r - step * Gp
        previous, rs = rs, (r * r).sum(1, keepdim=True)
        p = r + rs / previous.clamp_min(tiny) * p
    return S
