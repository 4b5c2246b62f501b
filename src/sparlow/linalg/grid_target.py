"""What a solver that puts values on a grid has to hit: the grid, and how what it finds will be stored.

A solver works on the weight divided by a power of two, ``unit``. Scales, levels and factors are rounded as they will be
stored before they are used, so that what is measured is what is stored.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparlow.linalg.grid import Grid, GridValues
from sparlow.linalg.rounding import Rounding

SCALES = (torch.bfloat16, torch.float16)  # types in which scales may be stored; bfloat16 for weights of any other


@dataclass(frozen=True, slots=True)
class Storage:
    """How the parts of a weight are stored.

    Attributes:
        weight: The type of the weight, and of factors that are not in int8.
        unit: A solver's S and V times this are those of the weight; a power of two.
    """

    weight: torch.dtype = torch.float32
    unit: float = 1.0

    @property
    def scales(self) -> torch.dtype:
        """The type of scales and levels, of 16 bits."""
        return self.weight if self.weight in SCALES else torch.bfloat16

    def rounded(self, x: Tensor, dtype: torch.dtype, unit: float = 1.0) -> Tensor:
        """Return x as it will be read when x · ``unit`` was stored in ``dtype``, in units of a solver again."""
        return (x * unit).to(dtype).float() / unit

    def scale(self, s: Tensor) -> Tensor:
        """Return scales of S, or of V, as they will be read."""
        return self.rounded(s, self.scales, self.unit)


@dataclass(frozen=True, slots=True)
class GridTarget:
    """The grid that S has to lie on.

    Attributes:
        grid: What was asked for.
        masked: Whether entries are pruned; if not, every entry has a code.
        storage: How the result is stored.
        int8_factors: Whether U and V are in int8.
    """

    grid: Grid
    masked: bool
    storage: Storage = Storage()
    int8_factors: bool = False

    def rounding(self, magnitudes: Tensor | None = None) -> Rounding:
        """Return the rounding to the grid's levels, those of a book as they will be read."""
        if magnitudes is not None:
            magnitudes = self.storage.rounded(magnitudes, self.storage.scales)
        return Rounding(self.grid, masked=self.masked, magnitudes=magnitudes)

    def values(self, scale: Tensor, rounding: Rounding) -> GridValues:
        """Return the grid of scales (out, groups), as a solver has them."""
        return GridValues(self.grid, scale, rounding.levels().to(scale.device), self.masked)

    def steps(self, scale: Tensor, columns: int) -> Tensor:
        """Return the scale of each entry (out, columns) from those of groups (out, groups)."""
        return scale.repeat_interleave(self.grid.group or columns, 1)[:, :columns]
