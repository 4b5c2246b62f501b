"""The coordinates in which a solver works: columns scaled, and in an order in which projecting on a pattern is cheap.

Also the Cholesky factorisation, with the damping that it may need.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparlow.errors import RunError

ESCALATION = 10.0  # factor by which damping is raised when a factorisation fails
ESCALATIONS = 6  # how often, before the layer is given up


@dataclass(frozen=True)
class Coordinates:
    """The scaled weight T = W E with its columns interleaved, and its metric G = E⁻¹ H E⁻¹ (in, in).

    Interleaved means that the first column of every group of m consecutive columns comes first, then the second of
    every group, and so on. So member k of all groups is contiguous in memory, and a processor compares many at a time.
    """

    scale: Tensor  # (in,) the diagonal of E, in the order of W
    G: Tensor  # (in, in), interleaved
    group: int  # m
    remember: int  # at most so many bytes of ridge inverses are kept
    added: list[float]  # damping that factorisations needed, for the Gram to report
    _ridges: dict[float, Tensor] = field(default_factory=dict, repr=False, compare=False)  # by ρ

    def to_scaled(self, W: Tensor) -> Tensor:
        """Return W E, interleaved. W may have any number of rows."""
        return self.interleave(W * self.scale)

    def from_scaled(self, T: Tensor) -> Tensor:
        """Undo ``to_scaled``."""
        return self.deinterleave(T) / self.scale

    def interleave(self, X: Tensor) -> Tensor:
        """Put the columns of X (rows, in) in the order of these coordinates."""
        return interleave(X, self.group)

    def deinterleave(self, X: Tensor) -> Tensor:
        """Undo ``interleave``: put the members of each group beside each other again."""
        return interleave(X, X.shape[1] // self.group)

    def root(self) -> Tensor:
        """Return R (in, in), lower, with R Rᵀ = G; damped further if it could not be factorised."""
        return self._factorised(self.G, "the metric of the coordinates")

    @property
    def remembered(self) -> int:
        """Bytes of the cached ridge inverses."""
        return sum(M.nbytes for M in self._ridges.values())

    def ridge(self, rho: float) -> Tensor:
        """Return M_ρ = ρ (G + ρI)⁻¹ (in, in), symmetric. It is cached: do not write into it.

        The first that fit into ``remember`` bytes stay. Every solve begins with the same ρ, so if the oldest were
        dropped instead, the next solve would find none of its own.
        """
        if rho in self._ridges:
            return self._ridges[rho]
        shifted = self.G.clone()
        shifted.diagonal().add_(rho)
        factor = self._factorised(shifted, "G + ρI")
        del shifted  # of a wide layer, each of these is the largest matrix there is
        M = torch.cholesky_inverse(factor).mul_(rho)
        if (len(self._ridges) + 1) * M.nbytes <= self.remember:
            self._ridges[rho] = M
        return M

    def _factorised(self, A: Tensor, what: str) -> Tensor:
        factor, damping = cholesky(A, what)
        if damping:
            self.added.append(damping)
        return factor


def interleave(X: Tensor, group: int) -> Tensor:
    """Interleave the columns of X (rows, in), of which ``group`` consecutive ones form a group; see ``Coordinates``."""
    if group in (1, X.shape[1]):
        return X
    rows, columns = X.shape
    return X.view(rows, columns // group, group).transpose(1, 2).reshape(rows, columns)


def cholesky(A: Tensor, what: str) -> tuple[Tensor, float]:
    """Factorise a symmetric ``A`` (n, n) of unit scale; return (lower factor, damping that had to be added).

    If A is not numerically positive definite, 1e-6·I is added, then ten times more, up to 0.1. If that is not enough,
    a RunError says that ``what`` could not be factorised. The damping is returned so that it can be reported.
    """
    factor, failed = torch.linalg.cholesky_ex(A)
    if not failed:
        return factor, 0.0
    size = A.diagonal().mean().item()
    damping = size * ESCALATION**-ESCALATIONS
    for _ in range(ESCALATIONS):
        factor, failed = torch.linalg.cholesky_ex(A + damping * torch.eye(A.shape[0], device=A.device, dtype=A.dtype))
        if not failed:
            return factor, damping
        damping *= ESCALATION
    raise RunError(f"A Cholesky factorisation failed ({what}), even with a damping of {damping / ESCALATION:.1g}.")
