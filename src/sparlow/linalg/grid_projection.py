"""The projection of a solver's iterates on pattern ∩ grid, in the coordinates that the solver works in."""

import torch
from torch import Tensor

from sparlow.linalg.coordinates import Coordinates
from sparlow.linalg.grid import GridValues
from sparlow.linalg.grid_target import GridTarget
from sparlow.linalg.patterns import Projector
from sparlow.linalg.scales import followed, learned, searched


class GridProjection:
    """D ← the points of the grid nearest to what the pattern keeps of X: a ``Projector``.

    Levels and scales suit the X with which it is made, and follow later ones by ``follow``. They are judged by the
    squared error in the coordinates of X, where every entry counts alike.

    Args:
        X: The iterate (out, in).
        base: The projection on the pattern alone; None if everything is kept.
        space: The coordinates.
        target: The grid.
    """

    def __init__(self, X: Tensor, base: Projector | None, space: Coordinates, target: GridTarget) -> None:
        self.base, self.space, self.target = base, space, target
        self._weight = space.scale.square()
        self._unit = space.interleave(space.scale[None])  # (1, in)
        Z = self._plain(X)
        self.rounding = learned(Z, self._weight, target)
        self._use(searched(Z, self._weight, target, self.rounding))

    def follow(self, X: Tensor) -> None:
        """Choose among scales near the present ones."""
        self._use(followed(self._plain(X), self._weight, self.target, self.rounding, self.scale))

    def __call__(self, X: Tensor, out: Tensor) -> Tensor:
        """Project X (out, in)."""
        kept = X if self.base is None else self.base(X, out)
        return self.rounding.to_grid(kept, self._step, out)

    def points(self, X: Tensor, mask: Tensor | None) -> tuple[Tensor, GridValues]:
        """Return what ``mask`` keeps of X, rounded, both (out, in) and in the order of the weight; and the grid."""
        Z = self.space.from_scaled(X)
        Z = Z if mask is None else Z * mask
        step = self.target.steps(self.scale, Z.shape[1])
        return self.rounding.to_grid(Z, step, Z), self.target.values(self.scale, self.rounding)

    def _plain(self, X: Tensor) -> Tensor:
        """What the pattern keeps of X, in the order and the units of the weight."""
        return self.space.from_scaled(X if self.base is None else self.base(X, torch.empty_like(X)))

    def _use(self, scale: Tensor) -> None:
        self.scale = scale  # (out, groups)
        self._step = self.space.interleave(self.target.steps(scale, self._unit.shape[1])) * self._unit
