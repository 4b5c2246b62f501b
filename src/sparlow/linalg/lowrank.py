"""Best rank-r approximations L = U V, in the plain norm and in the norm of a Gram matrix.

With H = R Rᵀ the minimiser of ‖(M − L) R‖_F over rank(L) ≤ r is P_r(M R) R⁻¹, P_r the truncated SVD. Its left factor
spans the leading left singular vectors of M R; given an orthonormal left factor U, V = Uᵀ M is optimal whatever the
norm. So no R⁻¹ is needed, and one alternating least-squares step, warm-started, is one step of subspace iteration.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sparlow.linalg.gram import Gram, summing
from sparlow.linalg.shared_rows import gathered, maximum, own, summed, total

SETTLED = 5e-4  # stop when a subspace step lowers the error by less than this fraction of it
STEPS = 6  # subspace steps before falling back to an SVD; two are usual
COMFORTABLE = (-8, 14)  # exponents of 2: a row whose largest entry lies between fits float16 (2^-14 to 2^16)


def truncated_svd(A: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return U (out, rank) and V (rank, in) that minimise ‖A − U V‖_F (Eckart and Young)."""
    P, sigma, Qt = torch.linalg.svd(gathered(A), full_matrices=False)
    return own(P[:, :rank] * sigma[:rank]), Qt[:rank]


def weighted_svd(M: Tensor, gram: Gram, rank: int) -> tuple[Tensor, Tensor]:
    """Return U (out, rank), orthonormal, and V (rank, in) that minimise tr((M − UV) H (M − UV)ᵀ) exactly.

    M (out, in) is not scaled. It costs one SVD of an (out, in) matrix.
    """
    P = torch.linalg.svd(gathered((M * gram.scale) @ gram.cholesky), full_matrices=False).U
    U = own(P[:, :rank].contiguous())
    return U, total(U.T @ M)


def svd_fit(M: Tensor, root: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U (out, rank) orthonormal and V (rank, in) minimising tr((M − UV) R Rᵀ (M − UV)ᵀ) for a ``root`` R (in, in)."""
    P = torch.linalg.svd(gathered(M @ root), full_matrices=False).U[:, :rank].contiguous()
    U = own(P)
    return U, total(U.T @ M)


def subspace_step(M: Tensor, G: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """One alternating least-squares step towards the best L = U V in the norm of G.

    Args:
        M: What is to be approximated (out, in).
        G: The metric (in, in), symmetric positive semi-definite.
        V: The right factor of the step before (r, in), or anything of full row rank to start from.

    Returns:
        U (out, r) with orthonormal columns and V = Uᵀ M (r, in): three skinny products.
    """
    return subspace_iteration(M, V, 1, G)


def subspace_iteration(M: Tensor, V: Tensor, steps: int, G: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Take ``steps`` steps as ``subspace_step`` does, in the norm of G (in, in) or, without one, in the plain norm."""
    for _ in range(steps):
        U = own(orthonormal(gathered(M @ (V.T if G is None else G @ V.T))))
        V = total(U.T @ M)
    return U, V


def best_fit(M: Tensor, G: Tensor, V: Tensor, root: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """Return U (out, r), orthonormal, and V (r, in) that minimise tr((M − UV) G (M − UV)ᵀ), as solvers do at the end.

    Takes subspace steps from V (r, in) until one lowers the error by no more than ``SETTLED`` of it. The error is a
    difference of large sums. If rounding hides it, or the steps do not settle, an SVD is computed too, and the
    better of the two fits is returned.

    Args:
        M: What is to be approximated (out, in).
        G: The metric (in, in).
        V: Where to start.
        root: Returns R (in, in) with R Rᵀ = G. It is called only for the SVD.
    """
    whole, explained = summed(_inner(M @ G, M)), 0.0
    for _ in range(STEPS):
        U = own(torch.linalg.qr(gathered(M @ (G @ V.T))).Q)
        V = total(U.T @ M)
        before, explained = explained, _inner(V @ G, V)
        if abs(explained - before) <= SETTLED * (whole - explained):
            return U, V
    fits = ((U, V), svd_fit(M, root(), len(V)))
    return min(fits, key=lambda fit: _error(M - fit[0] @ fit[1], G))


def _error(R: Tensor, G: Tensor) -> float:
    return summed(_inner(R @ G, R))


def _inner(A: Tensor, B: Tensor) -> float:
    """Return the sum of A ∘ B, accumulated in float64 if the device has it."""
    return float((A * B).sum(dtype=summing(A.device)))


def random_factor(rank: int, like: Tensor) -> Tensor:
    """Return V (rank, in), from which to start a subspace iteration for a matrix ``like`` (out, in).

    It is drawn on the CPU with a fixed seed: the same on every device, without touching the global generator.
    """
    V = torch.randn(rank, like.shape[1], generator=torch.Generator().manual_seed(0))
    return V.to(like)


def orthonormal(Y: Tensor) -> Tensor:
    """Return orthonormal columns (n, r) whose span contains that of Y (n, r), n ≥ r, even if those are dependent.

    On the CPU by Householder reflections, which are faster there than a single Cholesky QR. On accelerators they are
    many times slower, and checking whether one Cholesky QR was enough would need a synchronisation, so two are done.
    """
    if Y.device.type != "cpu":
        return cholesky_qr(cholesky_qr(Y))
    Q: Tensor = torch.linalg.qr(Y).Q
    return Q


def cholesky_qr(Y: Tensor) -> Tensor:
    """Orthonormalise the columns of Y (n, r) approximately; a second call reaches 1e-4 for condition numbers up to 1e5.

    Columns are scaled to unit length first. Their Gram matrix gets a jitter above its rounding error, so that its
    factorisation cannot fail. The jitter shortens columns that are orthogonal already, which the last line undoes.
    Directions weaker than the jitter come out short and not orthogonal to the others. A second call mends that.
    """
    Y = Y / Y.norm(dim=0).clamp_min(torch.finfo(Y.dtype).tiny)
    C = Y.T @ Y
    jitter = 4 * torch.finfo(Y.dtype).eps * max(Y.shape[1], 8)
    C.diagonal().add_(jitter)
    factor, _ = torch.linalg.cholesky_ex(C)  # _ex: no wait for the device to report failure
    Q: Tensor = torch.linalg.solve_triangular(factor, Y.T, upper=False)
    return Q.T * math.sqrt(1 + jitter)


def balanced(U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors of the same U V that fit half precision, by moving powers of two between U (out, r) and V (r, in).

    A column of U and its row of V are changed only if one of them lies outside ``COMFORTABLE``. Then both get about the
    same size. Nothing is rounded.
    """
    u, v = maximum(U.abs().amax(0)).log2(), V.abs().amax(1).log2()  # (r,) each
    low, high = COMFORTABLE
    outside = (torch.minimum(u, v) < low) | (torch.maximum(u, v) > high)
    shift = torch.where(outside & (u + v).isfinite(), ((v - u) / 2).round(), 0.0).exp2()
    return U * shift, V / shift[:, None]
