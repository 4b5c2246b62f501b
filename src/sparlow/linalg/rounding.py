"""Rounding to the nearest level of a grid, fast, and the code book that suits given numbers best.

The levels in use lie evenly around zero, ±m_0 … ±m_n. Evenly spaced ones are rounded to by arithmetic. Those of a book
are found by a search where numbers are few, a column of a weight or so, or the device is no CPU: each operation costs
its start there. Many numbers on a CPU are compared with each threshold, which takes a fifth of the time of a search.
Where entries are pruned, an entry that is zero stays zero, and every other gets a level that is not.
"""

from itertools import accumulate

import torch
from torch import Tensor

from sparlow.linalg.grid import Grid
from sparlow.linalg.portions import portion

COUNTED = 16  # magnitudes of a book up to which counting thresholds may be faster than a search
FEW = 4096  # numbers up to which a search is the faster one in any case
IN_CACHE = 2**16  # entries that are worked on at a time on a CPU: several operations then find them in its cache
SAMPLE = 2**17  # numbers that a book is learned from
LLOYD_ROUNDS = 20
GAP = 1 + 2**-6  # least ratio of two neighbouring magnitudes of a book, so that 16 bits keep them apart
SMALLEST = 2**-10  # magnitude of a book, of the largest
LARGEST, UNIT = 127, 2**-6  # magnitude of a book in units of a byte, and what a unit is: 16 bits hold all of them


class Rounding:
    """Rounds numbers, given in units of their scale, to the nearest level.

    Args:
        grid: The kind of levels.
        masked: Whether a zero is a pruned entry, and so stays.
        magnitudes: Of a book, m_0 … m_n, rising; the half-integers if left out.
    """

    def __init__(self, grid: Grid, *, masked: bool, magnitudes: Tensor | None = None) -> None:
        self.grid, self.masked = grid, masked
        plain = grid.uniform()
        half = plain[len(plain) // 2 :]  # of an integer grid, from 0 on
        own = half if magnitudes is None else magnitudes.float().cpu()
        self.magnitudes = own[1:] if grid.levels == "integer" and masked else own
        self.top = self.magnitudes[-1].item()
        self._even = magnitudes is None
        self._first = self.magnitudes[0].item()
        self._rises = self.magnitudes.diff().tolist()
        self._thresholds = (self.magnitudes[1:] + self.magnitudes[:-1]).div(2)
        self._counts = len(self.magnitudes) <= COUNTED
        # added one after the other, as counting does, so that both ways give the same bits
        summed = accumulate([self._first, *self._rises], lambda m, rise: torch.add(torch.tensor(m), rise).item())
        self._reached = torch.tensor([*summed]) if self._counts else self.magnitudes
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def levels(self) -> Tensor:
        """Return all levels (2^bits,), rising."""
        if self.grid.levels == "integer":
            return self.grid.uniform()
        return torch.cat([-self.magnitudes.flip(0), self.magnitudes])

    def __call__(self, z: Tensor) -> Tensor:
        """Return the level nearest to each entry of z, of any shape."""
        a = z.abs()
        if self._even:
            rounded = a.round_() if self.grid.levels == "integer" else a.floor_().add_(0.5)
            rounded = rounded.clamp_(self._first, self.top)
        elif self._counts and a.numel() > FEW and a.device.type == "cpu":
            rounded, passed = torch.full_like(a, self._first), torch.empty_like(a)
            for threshold, rise in zip(self._thresholds.tolist(), self._rises, strict=True):
                rounded.add_(torch.ge(a, threshold, out=passed), alpha=rise)  # numbers: bools take far longer
        else:
            rounded = self._searched(a)
        return rounded.mul_(z.sign()) if self.masked else rounded.copysign_(z).add_(0.0)  # no negative zero

    def _searched(self, a: Tensor) -> Tensor:
        """Return the magnitude nearest to each entry of a, of any shape."""
        kind = a.device, a.dtype
        if kind not in self._tables:
            self._tables[kind] = self._thresholds.to(a), self._reached.to(a)
        thresholds, magnitudes = self._tables[kind]
        places = torch.bucketize(a, thresholds, right=True, out_int32=True)
        return magnitudes.index_select(0, places.flatten()).view_as(a)

    def to_grid(self, X: Tensor, step: Tensor, out: Tensor) -> Tensor:
        """Write into ``out`` the points nearest to X (rows, columns) of the grids of ``step``, which broadcasts to X.

        ``out`` may be X.
        """
        for rows in row_blocks(X):
            steps = step[rows]
            z = torch.div(X[rows], torch.where(steps == 0, 1.0, steps))
            torch.mul(self(z), steps, out=out[rows])
        return out


def row_blocks(X: Tensor) -> list[slice]:
    """Return slices of the rows of X that fit a CPU's cache; of another device, all rows at once."""
    rows = len(X) if X.device.type != "cpu" else max(portion(IN_CACHE) * len(X) // max(X.numel(), 1), 1)
    return [slice(start, start + rows) for start in range(0, len(X), max(rows, 1))]


def learn_magnitudes(z: Tensor, weight: Tensor, start: Tensor) -> Tensor:
    """Return the magnitudes (n,) of a book that round ``z`` with the least weighted squared error, by Lloyd's rounds.

    Each round moves a magnitude to the weighted mean of the numbers that are nearest to it, so no round ends higher.

    Args:
        z: Numbers in units of their scale, of any shape; a sample of them is looked at.
        weight: Of their squared errors, of the same shape, not negative.
        start: Magnitudes (n,), rising, from which to begin.
    """
    x, w = z.abs().flatten(), weight.flatten()
    stride = -(-len(x) // portion(SAMPLE))
    x, order = x[::stride].double().cpu().sort()
    w = w[::stride].double().cpu()[order]
    sums = torch.stack([w, w * x]).cumsum(1)  # (2, numbers)
    sums = torch.cat([sums.new_zeros(2, 1), sums], dim=1)
    m = start.double().cpu()
    for _ in range(LLOYD_ROUNDS):
        bounds = torch.searchsorted(x, (m[1:] + m[:-1]) / 2)
        edges = torch.cat([bounds.new_zeros(1), bounds, bounds.new_full((1,), len(x))])
        mass, moment = sums[:, edges].diff()
        m = torch.where(mass > 0, moment / mass.clamp_min(torch.finfo(torch.float64).tiny), m)
    return _apart(m).float()


def whole_magnitudes(m: Tensor) -> Tensor:
    """Return magnitudes (n,), up to 127 of them: those of m times a factor, in integers of units of 2^−6.

    They rise from 1 or more to 127 units. A kernel then multiplies levels of a byte each by inputs in int8, exactly.
    """
    found = (m * (LARGEST / m[-1])).round().tolist()
    for k in range(len(found)):
        found[k] = max(found[k], found[k - 1] + 1 if k else 1)
    for k in range(len(found)):
        found[k] = min(found[k], LARGEST - (len(found) - 1 - k))
    return torch.tensor(found) * UNIT


def _apart(m: Tensor) -> Tensor:
    """Return magnitudes (n,) that rise by ``GAP`` at least, and begin above zero."""
    found = m.tolist()
    found[0] = max(found[0], found[-1] * SMALLEST)
    for k in range(1, len(found)):
        found[k] = max(found[k], found[k - 1] * GAP)
    return torch.tensor(found, dtype=m.dtype)
