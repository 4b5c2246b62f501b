"""S as whole numbers of few bits times a scale, as other programs store weights: exact where its grid allows it.

Other programs know whole levels with zero among them. Levels ``integer`` are that; levels ``half``, c + ½, are odd
numbers times half the scale, which takes a bit more; learned ones are not whole.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparlow.errors import InputError
from sparlow.exporting.stored import Layer
from sparlow.linalg.grid import Grid

_TIMES = {"integer": 1, "half": 2}  # to make levels whole


class Integers(NamedTuple):
    """S = scale · codes.

    Attributes:
        codes: (out, in) int8; 0 where S is pruned.
        scale: (out, in / group), in float32.
        group: Columns that share a scale; it divides them.
    """

    codes: Tensor
    scale: Tensor
    group: int


@dataclass(frozen=True, slots=True)
class Need:
    """The least bits in which a grid is kept exactly; None if it cannot be, or if values are on none."""

    bits: int | None

    @classmethod
    def of(cls, grid: Grid | None) -> "Need":
        """Look at the levels of a grid alone."""
        if grid is None or grid.levels not in _TIMES:
            return cls(None)
        largest = int(_TIMES[grid.levels] * float(grid.uniform()[-1]))
        return cls(next((bits for bits in (4, 8) if largest <= largest_code(bits)), None))


def largest_code(bits: int) -> int:
    """Return the largest code of so many bits, of which the lowest is not used."""
    return (1 << (bits - 1)) - 1


def group_of(grid: Grid | None, columns: int) -> int:
    """Return the columns that share a scale, such that they divide a row: of 576 columns in groups of 128, 64."""
    if grid is not None and grid.group is None:
        return columns
    return math.gcd(columns, grid.group if grid and grid.group else 128)


def exact_integers(layer: Layer, group: int | None = None) -> Integers:
    """Return S as it is stored, in whole numbers.

    Args:
        layer: It.
        group: Columns that share a scale, which divide ``group_of`` its grid; if left out, that.

    Raises:
        InputError: Its scales have no half in their type, or its levels are not whole.
    """
    values = layer.form.values if layer.form else None
    if values is None or values.grid.levels not in _TIMES:
        raise InputError(f"{layer.name} has no whole levels.")
    times = _TIMES[values.grid.levels]
    levels = values.grid.uniform() * times
    codes = levels[values.encode(layer.S).long()].to(torch.int8)
    if values.masked:
        codes = codes.masked_fill(layer.S == 0, 0)
    own = values.grid.group or layer.S.shape[1]
    group = group or group_of(values.grid, layer.S.shape[1])
    starts = torch.arange(0, layer.S.shape[1], group) // own
    return Integers(codes, values.scale.float()[:, starts] / times, group)


def rounded_integers(W: Tensor, bits: int, group: int, dtype: torch.dtype) -> Integers:
    """Return a weight (out, in) rounded to nearest, with a scale of a type for each group of columns."""
    grouped = W.float().view(len(W), -1, group)
    largest = largest_code(bits)
    scale = (grouped.abs().amax(2) / largest).to(dtype).float()
    steps = torch.where(scale == 0, 1.0, scale).unsqueeze(2)
    codes = (grouped / steps).round().clamp(-largest, largest).to(torch.int8)
    return Integers(codes.view_as(W), scale, group)
