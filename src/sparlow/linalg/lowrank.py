"""Best rank-r approximations L = U V, in the plain norm and in the norm of a Gram matrix.

With H = R Rᵀ the minimiser of ‖(M − L) R‖_F over rank(L) ≤ r is P_r(M R) R⁻¹, P_r the truncated SVD. Its left factor
spans the leading left singular vectors of M R; given an orthonormal left factor U, V = Uᵀ M is optimal whatever the
norm. So no R⁻¹ is needed, and one alternating least-squares step, warm-started, is one step of subspace iteration.
"""

import torch
from torch import Tensor

from sparlow.linalg.gram import Gram


def truncated_svd(A: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U (out, rank), V (rank, in) minimising ‖A − U V‖_F; Eckart and Young."""
    P, sigma, Qt = torch.linalg.svd(A, full_matrices=False)
    return P[:, :rank] * sigma[:rank], Qt[:rank]


def weighted_svd(M: Tensor, gram: Gram, rank: int) -> tuple[Tensor, Tensor]:
    """U (out, rank) orthonormal and V (rank, in) minimising tr((M − UV) H (M − UV)ᵀ), exactly.

    M (out, in) is in the layer's own coordinates. Costs one SVD of (out, in).
    """
    P, _, _ = torch.linalg.svd((M * gram.scale) @ gram.cholesky, full_matrices=False)
    U = P[:, :rank].contiguous()
    return U, U.T @ M


def subspace_step(M: Tensor, G: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """One alternating least-squares step towards the best L = U V in the norm of G.

    Args:
        M: What is to be approximated (out, in).
        G: The metric (in, in), symmetric positive semi-definite.
        V: The right factor of the step before (r, in), or anything of full row rank to start from.

    Returns:
        U (out, r) with (nearly) orthonormal columns and V = Uᵀ M (r, in): three skinny products.
    """
    return subspace_iteration(M, V, 1, G)


def subspace_iteration(M: Tensor, V: Tensor, steps: int, G: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Take ``steps`` steps as ``subspace_step`` does, in the norm of G (in, in) or, without one, in the plain norm."""
    for _ in range(steps):
        U = orthonormal(M @ (V.T if G is None else G @ V.T))
        V = U.T @ M
    return U, V


def random_factor(rank: int, like: Tensor) -> Tensor:
    """V (rank, in) to start a subspace iteration from, for a matrix ``like`` (out, in).

    Drawn on the CPU from a seed of its own: the same on every device, and the global generator stays as it is.
    """
    V = torch.randn(rank, like.shape[1], generator=torch.Generator().manual_seed(0))
    return V.to(like)


def orthonormal(Y: Tensor) -> Tensor:
    """Orthonormalise the columns of Y (n, r) by Cholesky QR, four times as fast as Householder QR here.

    Columns are scaled to unit length first. The Gram matrix of the columns gets a jitter above its rounding error, so
    that its factorisation cannot fail: directions below that level come out shorter than 1, which a subspace
    iteration corrects in its next steps.
    """
    Y = Y / Y.norm(dim=0).clamp_min(torch.finfo(Y.dtype).tiny)
    C = Y.T @ Y
    C.diagonal().add_(4 * torch.finfo(Y.dtype).eps * max(Y.shape[1], 8))
    factor, _ = torch.linalg.cholesky_ex(C)  # _ex: no wait for the device to report failure
    Q: Tensor = torch.linalg.solve_triangular(factor, Y.T, upper=False)
    return Q.T
