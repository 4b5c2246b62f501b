"""The iterates of an ADMM for S and U V, and the steps and the pace that its schedules share.

The letters are those of ``three_basil.py``: T = W E, G = E⁻¹ H E⁻¹, X = S + Y, D its projection, Q = T − (2 D − X), and
M = ρ (G + ρI)⁻¹.
"""

import math
from contextlib import nullcontext

import torch
from torch import Tensor

from sparlow.linalg.coordinates import Coordinates
from sparlow.linalg.lowrank import orthonormal, random_factor, subspace_step, svd_fit
from sparlow.linalg.patterns import Pattern, Projector
from sparlow.linalg.shared_rows import Ahead, gathered, own, summed, total
from sparlow.linalg.tf32 import rounded_products


def level(effort: float) -> int:
    """Steps of the joint schedule at one ρ: fewer at low effort, but each rise costs an inverse."""
    return max(round(10 * math.sqrt(effort)), 5)


def pace(effort: float) -> tuple[int, float]:
    """Steps of the joint schedule at one ρ, and the factor by which it rises: 1.44 in ``10·effort`` steps."""
    every = level(effort)
    return every, 1.44 ** (every / (10 * effort))


class Loop:
    """The iterates, and the steps that all schedules are made of; ``exact`` takes each of them to the letter.

    ρ is to rise by the factor ``growth``, as far as that is known.
    """

    def __init__(
        self,
        target: Tensor,
        space: Coordinates,
        pattern: Pattern,
        rank: int,
        rho: float,
        *,
        growth: float = 1.0,
        exact: bool = False,
    ) -> None:
        self.T, self.G, self.space, self.rho = target, space.G, space, rho
        self.project = _selection(pattern, space) if exact else pattern.projector()
        self.root = space.root() if exact and rank else None  # (in, in)
        self.rounding = nullcontext if exact else rounded_products
        self.kept = max(summed(pattern.kept((target.shape[0], target.shape[1]))), 1)
        self.D = self.project(target, torch.empty_like(target))  # (out, in)
        self.X = self.D.clone()  # S + Y (out, in)
        self.seen = self.D.bool()
        self.Q = target - self.D  # T − Z (out, in)
        self.U = target.new_zeros(target.shape[0], rank)
        self.V = random_factor(rank, target)  # (r, in)
        self._ridges = Ahead(space.ridge)
        self.M = self._ridges.at(rho, growth)
        self.looks: list[tuple[int, float]] = []  # iterations, share of the kept entries that changed

    def fit_jointly(self) -> None:
        """L for the S that will follow: best fit of Q in the metric I − M."""
        if self.V.shape[0]:
            self.U = own(orthonormal(gathered(self.Q @ (self.V - self.V @ self.M).T)))
            self.V = total(self.U.T @ self.Q)

    def fit_to_residual(self, S: Tensor) -> None:
        """L for the S just found: best fit of T − S in the metric G (the paper's third block)."""
        if self.root is not None:
            self.U, self.V = svd_fit(self.T - S, self.root, len(self.V))
        elif self.V.shape[0]:
            self.U, self.V = subspace_step(self.T - S, self.G, self.V)

    def update(self) -> None:
        """Ridge step for S, projection to D, ascent of Y; every step writes into what is there, and takes no memory."""
        self.Q.addmm_(self.U, self.V, beta=-1)  # Z − R = L − Q
        self.D.sub_(self.Q)
        with self.rounding(self.Q.device):
            self.X, self.D = self.D.addmm_(self.Q, self.M), self.X
        self.project(self.X, self.D)
        self._follow()

    def move_to(self, project: Projector) -> None:
        """Project to another set from now on."""
        self.project = project
        project(self.X, self.D)
        self._follow()

    def _follow(self) -> None:
        """Let Q follow X and D."""
        torch.add(self.T, self.X, out=self.Q).sub_(self.D, alpha=2)

    def support_change(self) -> float:
        """Share of the kept entries that changed since the last look."""
        before, self.seen = self.seen, self.D.bool()  # a comparison takes thirty times as long
        return summed((before ^ self.seen).count_nonzero().item()) / self.kept

    def raise_rho(self, factor: float) -> None:
        """ρ ← ρ·factor; the multiplier itself stays, so Y = X − D, which is divided by ρ, shrinks."""
        self.X.lerp_(self.D, 1 - 1 / factor)
        self._follow()
        self.rho *= factor
        del self.M  # frees memory for the next
        self.M = self._ridges.at(self.rho, factor)


def _selection(pattern: Pattern, space: Coordinates) -> Projector:
    """The projection by an exact selection, of columns that are dealt."""

    def project(X: Tensor, out: Tensor) -> Tensor:
        return out.copy_(space.interleave(pattern.mask(space.deinterleave(X).abs()))).mul_(X)

    return project
