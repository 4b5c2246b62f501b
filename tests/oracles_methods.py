"""Slow, obvious versions of the older methods, from their papers: float64, nothing imported from sparlow.

``choose`` always takes scores (rows, columns) and returns a mask, by sorting; see ``oracles``.
"""

from collections.abc import Callable

import torch
from torch import Tensor

import oracles

Choose = Callable[[Tensor], Tensor]


def sparsegpt(W: Tensor, H: Tensor, choose: Callable[[Tensor, int], Tensor], group: int) -> Tensor:
    """Optimal brain surgery on one column after the other.

    When column j is reached, those before it are fixed: what counts is the inverse of the rest of H. To remove w_j then
    costs w_j² / [H⁻¹]_jj, and the best the rest can do about it is w ← w − w_j / [H⁻¹]_jj · [H⁻¹]_j.

    Args:
        W: Weight (out, in).
        H: Damped second moments (in, in).
        choose: Scores (out, group) of the columns from some column on, and that column → mask.
        group: Columns whose mask is chosen when the first of them is reached.
    """
    W, H = W.double().clone(), H.double()
    inverses = [torch.linalg.inv(H[j:, j:]) for j in range(len(H))]
    cost = torch.stack([inverse[0, 0] for inverse in inverses])  # (in,)
    for j in range(len(H)):
        if j % group == 0:
            mask = choose(W[:, j : j + group] ** 2 / cost[j : j + group], j)
        removed = ~mask[:, j % group]
        W[removed, j:] -= W[removed, j : j + 1] / cost[j] * inverses[j][0]
        W[removed, j] = 0  # as it is, but for rounding
    return W


def gptq(W: Tensor, H: Tensor, scale: Tensor, group: int) -> Tensor:
    """Round column after column to −7 … 7 times a given scale (out, groups), and let the rest make up for it."""
    W, H = W.double().clone(), H.double()
    for j in range(len(H)):
        inverse = torch.linalg.inv(H[j:, j:])
        step = scale[:, j // group]
        rounded = (W[:, j] / step).round().clamp(-7, 7) * step
        W[:, j:] -= ((W[:, j] - rounded) / inverse[0, 0])[:, None] * inverse[0]
        W[:, j] = rounded  # as it is, but for rounding of another kind
    return W


def alps_admm(W: Tensor, H: Tensor, choose: Choose, *, max_steps: int = 300) -> tuple[Tensor, Tensor, float]:
    """ADMM of ALPS by the letter; return the last B + V/ρ (out, in) in unit-diagonal coordinates, its mask, and ρ."""
    W, H = W.double(), H.double()
    E = H.diagonal().sqrt()
    Ht, eye = H / E / E[:, None], torch.eye(len(H), dtype=torch.float64)
    rho, V = 0.1, torch.zeros_like(W)
    seen = choose((W * E).abs())
    D = W * E * seen
    for step in range(1, max_steps + 1):
        B = torch.linalg.solve(Ht + rho * eye, (W * E) @ Ht - V + rho * D, left=False)
        X = B + V / rho
        mask = choose(X.abs())
        D = X * mask
        V = V + rho * (B - D)
        if step % 3 == 0:
            changes = (mask ^ seen).sum().item()
            if changes == 0:
                break
            share = changes / mask.sum().item()
            rho *= 1.3 if share > 0.1 else 1.2 if share > 0.005 else 1.1
            seen = mask
    return X, mask, rho


def alps(W: Tensor, H: Tensor, choose: Choose) -> Tensor:
    """ALPS with exact least squares on the support where the paper has a few conjugate-gradient steps."""
    return oracles.least_squares(W, H, alps_admm(W, H, choose)[1])


def hassle_free(
    W: Tensor, H: Tensor, prune: Callable[[Tensor], Tensor], rank: int, rounds: int
) -> tuple[Tensor, Tensor]:
    """Prune what L leaves, fit L to what S leaves, an SVD in every round; return S and L (out, in)."""
    L = torch.zeros_like(W, dtype=torch.float64)
    for _ in range(rounds):
        S = prune(W - L)
        L = oracles.weighted_low_rank(W - S, H, rank)
    return S, L


def oats(W: Tensor, H: Tensor, choose: Choose, rank: int, rounds: int) -> tuple[Tensor, Tensor]:
    """Alternating thresholding with an SVD in every round; return S and L (out, in)."""
    scale = H.diagonal().double().sqrt()
    T = W.double() * scale
    S = torch.zeros_like(T)
    for _ in range(rounds):
        P, sigma, Qt = torch.linalg.svd(T - S, full_matrices=False)
        L = (P[:, :rank] * sigma[:rank]) @ Qt[:rank]
        S = (T - L) * choose((T - L).abs())
    return S / scale, L / scale
