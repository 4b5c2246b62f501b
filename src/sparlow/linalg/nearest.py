"""Plain rounding: every entry to the nearest point of a grid whose scales follow from the largest entries."""

import torch
from torch import Tensor
from torch.nn import functional

from sparlow.linalg.grid import Grid, GridValues


def nearest(W: Tensor, grid: Grid) -> Tensor:
    """Return the matrix (out, in), in float32, whose entries are the nearest on a grid to those of W (out, in).

    No data are looked at, and the largest entry of a group of columns decides on its scale. Of a book the levels are
    those from which it is learned.
    """
    values = grid_of_largest(W, grid)
    return values.decode(values.encode(W))


def grid_of_largest(W: Tensor, grid: Grid, *, masked: bool = False) -> GridValues:
    """Return the grid, with scales, that holds the largest entry of each group of columns of W (out, in).

    Args:
        W: It.
        grid: Its kind.
        masked: Whether zeros stand outside of it.
    """
    rows, columns = W.shape
    width = min(grid.group or columns, columns)
    groups = functional.pad(W.float(), (0, -columns % width)).view(rows, -1, width)
    levels = grid.uniform().to(W.device)
    return GridValues(grid, (groups.abs().amax(2) / levels[-1]).to(torch.bfloat16), levels, masked)
