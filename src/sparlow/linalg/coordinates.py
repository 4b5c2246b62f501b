"""Where solvers work: the columns of a weight scaled, and in the order in which a pattern is cheap to project on.

Also the factorisation that everything here rests on, with the damping that it may need.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparlow.errors import RunError

ESCALATION = 10.0  # factor by which damping is raised when a factorisation fails
ESCALATIONS = 6  # how often, before the layer is given up


@dataclass(frozen=True)
class Coordinates:
    """T = W E with its columns dealt, and the metric G = E⁻¹ H E⁻¹ (in, in) that belongs to it; of a Gram.

    Dealt means that of groups of m consecutive columns the first members come first, then the second ones: member k of
    all groups lies in one stretch of memory, where a processor compares many at a time.
    """

    scale: Tensor  # (in,) the diagonal of E, in the order of W
    G: Tensor  # (in, in), dealt
    group: int  # m
    remember: int  # bytes of ridge inverses that it keeps, at most
    added: list[float]  # damping that factorisations needed, for the Gram to report
    _ridges: dict[float, Tensor] = field(default_factory=dict, repr=False, compare=False)  # by ρ

    def enter(self, W: Tensor) -> Tensor:
        """Return W E, dealt; (out, in) or any other number of rows."""
        return self.deal(W * self.scale)

    def leave(self, T: Tensor) -> Tensor:
        """Undo ``enter``."""
        return self.gather(T) / self.scale

    def deal(self, X: Tensor) -> Tensor:
        """Put the columns of X (rows, in) in the order of these coordinates."""
        return deal(X, self.group)

    def gather(self, X: Tensor) -> Tensor:
        """Undo ``deal``: put the members of each group beside each other again."""
        return deal(X, X.shape[1] // self.group)

    def root(self) -> Tensor:
        """Return R (in, in), lower, with R Rᵀ = G; damped further if it could not be factorised."""
        return self._factorised(self.G, "the metric of the coordinates")

    @property
    def remembered(self) -> int:
        """Bytes of the ridge inverses it holds."""
        return sum(M.nbytes for M in self._ridges.values())

    def ridge(self, rho: float) -> Tensor:
        """M_ρ = ρ (G + ρI)⁻¹ (in, in), symmetric; remembered, so not to be written into.

        The first that fit into ``remember`` bytes stay: a solve that is repeated begins with the same ρ every time, and
        to forget the oldest instead would mean to have none when it starts again.
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


def deal(X: Tensor, group: int) -> Tensor:
    """Order the columns of X (rows, in) by their place in the group of ``group`` consecutive ones that each is in."""
    if group in (1, X.shape[1]):
        return X
    rows, columns = X.shape
    return X.view(rows, columns // group, group).transpose(1, 2).reshape(rows, columns)


def cholesky(A: Tensor, what: str) -> tuple[Tensor, float]:
    """Factorise a symmetric ``A`` (n, n) of unit scale; return (lower factor, damping that had to be added).

    If A is not numerically positive definite, 1e-6·I is added, then ten times more, up to 0.1; past that a RunError
    names ``what`` could not be factorised. The damping is returned so that it is reported, never hidden.
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
