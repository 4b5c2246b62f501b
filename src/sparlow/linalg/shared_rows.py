"""The rows of one weight, of which each of several processes solves some.

Most of what a solver does to a row concerns no other row. Where it adds up over rows, or looks at all of them, it calls
these functions. They change nothing where a weight is whole, in one process or in one of several.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

import torch
from torch import Tensor


class Rows(Protocol):
    """What processes that share the rows of a weight exchange; all of them must call each function, in one order."""

    @property
    def rank(self) -> int:
        """Number of this process."""

    @property
    def size(self) -> int:
        """How many there are."""

    def sent(self, tensor: Tensor, source: int) -> Tensor:
        """Copy a tensor of process ``source`` to all others, in place; return it."""

    def summed(self, number: float) -> float:
        """Add up a number over all processes."""

    def total(self, part: Tensor) -> Tensor:
        """Add up a tensor over all processes; it may be overwritten."""

    def maximum(self, part: Tensor) -> Tensor:
        """Return the largest of each entry over all processes."""

    def gathered(self, part: Tensor) -> Tensor:
        """Return the rows of all processes, of which ``part`` are this one's."""

    def own(self, whole: Tensor) -> Tensor:
        """Return this process's rows of all."""


_rows: ContextVar[Rows | None] = ContextVar("rows", default=None)


@contextmanager
def sharing(rows: Rows) -> Iterator[None]:
    """Within this context, weights are parts of larger ones, whose other rows other processes have."""
    token = _rows.set(rows)
    try:
        yield
    finally:
        _rows.reset(token)


class Ahead:
    """What is needed one after the other, and costs much: with several processes each finds another one ahead.

    Args:
        find: Finds one, always a tensor of one shape.
    """

    def __init__(self, find: Callable[[float], Tensor]) -> None:
        self._find = find
        self._found: dict[float, int] = {}  # by the process that has it
        self._own: Tensor | None = None

    def at(self, x: float, factor: float) -> Tensor:
        """Return what is found at x, if it is likely that x·factor, and so on, will be asked for next."""
        rows = _rows.get()
        if rows is None:
            return self._find(x)
        if x not in self._found or self._own is None:
            ahead = [x]
            while len(ahead) < rows.size:
                ahead.append(ahead[-1] * factor)  # as one process would come to it, to the bit
            self._found = {value: rank for rank, value in reversed([*enumerate(ahead)])}
            self._own = None  # frees memory for the next
            self._own = self._find(ahead[rows.rank])
        source = self._found.pop(x)
        return rows.sent(self._own if source == rows.rank else torch.empty_like(self._own), source)


def summed(number: float) -> float:
    """See ``Rows``."""
    rows = _rows.get()
    return number if rows is None else rows.summed(number)


def total(part: Tensor) -> Tensor:
    """See ``Rows``."""
    rows = _rows.get()
    return part if rows is None else rows.total(part)


def maximum(part: Tensor) -> Tensor:
    """See ``Rows``."""
    rows = _rows.get()
    return part if rows is None else rows.maximum(part)


def of_first(whole: Tensor) -> Tensor:
    """Return what the first process has: of what all find alike, the same bits whatever their machines."""
    rows = _rows.get()
    return whole if rows is None else rows.sent(whole, 0)


def sampled(part: Tensor, count: int) -> Tensor:
    """Return at least so many rows of all (if there are as many), evenly spread, the same in every process."""
    if _rows.get() is None:
        return part[:: max(len(part) // count, 1)].contiguous()
    everyone = torch.arange(int(summed(len(part))), device=part.device)
    stride = max(len(everyone) // count, 1)
    mine = own(everyone)
    chosen = mine % stride == 0
    found = part.new_zeros(-(-len(everyone) // stride), *part.shape[1:])
    found[mine[chosen] // stride] = part[chosen]
    return total(found)


def largest(number: float) -> float:
    """Return the largest of a number over all processes."""
    rows = _rows.get()
    return number if rows is None else rows.maximum(torch.tensor(number, dtype=torch.float64)).item()


def gathered(part: Tensor) -> Tensor:
    """See ``Rows``."""
    rows = _rows.get()
    return part if rows is None else rows.gathered(part)


def own(whole: Tensor) -> Tensor:
    """See ``Rows``."""
    rows = _rows.get()
    return whole if rows is None else rows.own(whole)
