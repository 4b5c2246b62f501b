"""Slow, obvious versions of what sparlow does fast, and the synthetic layer that both are tried on.

Written from the definitions, in float64, and with nothing imported from sparlow.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

SEQUENCES = 16  # windows that the tokens of ``problem`` are said to come from


def problem(
    out: int,
    inp: int,
    seed: int,
    *,
    tokens: int = 1024,
    outliers: int = 2,
    massive: int = 0,
    factors: int = 0,
    noise: float = 0.3,
) -> tuple[Tensor, Tensor]:
    """A layer as found in language models: weight W (out, in) and undamped H (in, in), float32.

    The inputs follow a few common ``factors`` (a fifth of the width) up to some ``noise``, have uneven scales and
    ``outliers`` features ten times as large; the weight is heavy-tailed around a low-rank
    part. ``massive`` features more follow one common factor at a scale of 1e4.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    factors = factors or max(inp // 5, 1)
    X = rng.standard_normal((tokens, factors)) @ rng.standard_normal((factors, inp)) / factors**0.5
    X += noise * rng.standard_normal((tokens, inp))
    X *= rng.lognormal(sigma=0.5, size=inp)
    large = rng.permutation(inp)
    X[:, large[:outliers]] *= 10
    if massive:
        spikes = 1e4 * rng.standard_t(3, (tokens, 1))
        X[:, large[outliers : outliers + massive]] += spikes * rng.uniform(0.5, 1.5, massive)
    W = rng.laplace(size=(out, inp)) + rng.standard_normal((out, 4)) @ rng.standard_normal((4, inp))
    H = 2 / SEQUENCES * X.T @ X
    return torch.from_numpy(W / inp**0.5).float(), torch.from_numpy(H).float()


def damp(H: Tensor, absolute: float = 0.005, relative: float = 0.005) -> Tensor:
    """H + absolute·mean(diag H)·I + relative·diag(H), entry by entry, in float64."""
    H = H.double().clone()
    diagonal = H.diagonal().clone()
    for j in range(len(H)):
        H[j, j] += absolute * diagonal.sum() / len(H) + relative * diagonal[j]
    return H


def objective(residual: Tensor, H: Tensor) -> float:
    """tr(R H Rᵀ) in float64."""
    residual = residual.double()
    return torch.trace(residual @ H.double() @ residual.T).item()


def best_of_group(scores: Sequence[float], n: int) -> tuple[int, ...]:
    """Of all subsets of n the one of the largest sum, the first of them in lexicographic order; exact arithmetic."""
    return max(combinations(range(len(scores)), n), key=lambda subset: sum(Fraction(scores[i]) for i in subset))


def nm_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """Try every subset of every group of m entries of a row."""
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    for row in range(scores.shape[0]):
        for start in range(0, scores.shape[1], m):
            for i in best_of_group(scores[row, start : start + m].tolist(), n):
                mask[row, start + i] = True
    return mask


def largest_mask(scores: Tensor, count: int) -> Tensor:
    """Sort everything; the first of equals comes first."""
    flat = scores.flatten().tolist()
    order = sorted(range(len(flat)), key=lambda i: (-flat[i], i))
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[order[:count]] = True
    return mask.reshape(scores.shape)


def weighted_low_rank(M: Tensor, H: Tensor, rank: int) -> Tensor:
    """L = P_r(M R) R⁻¹ (out, in) with R = Q Λ^½ from the eigenvectors of H, P_r the truncated SVD."""
    eigenvalues, Q = torch.linalg.eigh(H.double())
    root = eigenvalues.clamp_min(1e-12 * eigenvalues[-1]).sqrt()
    P, sigma, Vt = torch.linalg.svd(M.double() @ (Q * root), full_matrices=False)
    L: Tensor = (P[:, :rank] * sigma[:rank]) @ Vt[:rank] / root @ Q.T
    return L


def least_squares(target: Tensor, H: Tensor, mask: Tensor) -> Tensor:
    """Minimise ‖(t − s) R‖, H = R Rᵀ, over the s that live on the mask, one row after the other."""
    Rt = torch.linalg.cholesky(H.double()).T
    S = torch.zeros(target.shape, dtype=torch.float64)
    for i, support in enumerate(mask):
        S[i, support] = torch.linalg.lstsq(Rt[:, support], Rt @ target[i].double()).solution
    return S


def paper_admm(
    W: Tensor, H: Tensor, choose: Callable[[Tensor], Tensor], rank: int, *, max_steps: int = 2000
) -> tuple[Tensor, Tensor, Tensor, float]:
    """3BASiL by the letter: three blocks, an SVD in every step, the paper's rule for ρ.

    Args:
        W: Weight (out, in).
        H: Damped second moments (in, in).
        choose: Scores (out, in) → mask.
        rank: Of L.
        max_steps: Bound on the iterations.

    Returns:
        D E⁻¹ (out, in) on the pattern, L (out, in), the last unprojected S̃ (out, in), and ρ.
    """
    W, H = W.double(), H.double()
    E = H.diagonal().sqrt()
    Ht, eye = H / E / E[:, None], torch.eye(len(H), dtype=torch.float64)
    rho, L, V = 0.1, torch.zeros_like(W), torch.zeros_like(W)
    seen = choose((W * E).abs())
    D = W * E * seen
    S = D
    for step in range(1, max_steps + 1):
        S = torch.linalg.solve(Ht + rho * eye, ((W - L) * E) @ Ht - V + rho * D, left=False)
        mask = choose((S + V / rho).abs())
        D = (S + V / rho) * mask
        V = V + rho * (S - D)
        L = weighted_low_rank(W - S / E, H, rank) if rank else L
        if step % 10 == 0:
            change = (mask ^ seen).sum().item() / mask.sum().item()
            if step >= 100 and change < 3e-4:
                break
            rho *= 1.1 if change > 0.1 else 1.05 if change > 0.005 else 1.02
            seen = mask
    return D / E, L, S, rho
