"""How many entries are worked on or looked at at a time, where that does not grow with a layer.

A small layer does not reach such a bound. So that what is held while a small one is solved tells what a large one will
take, the bounds can be made as small beside it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_divisor: ContextVar[int] = ContextVar("divisor", default=1)


def portion(count: int) -> int:
    """Return how many to take at a time where ``count`` is the bound: ``count``, unless a layer stands for a large one.

    Results depend on it where it bounds what is looked at.
    """
    return max(count // _divisor.get(), 1)


@contextmanager
def standing_for_a_larger(times: int) -> Iterator[None]:
    """Within this context, portions are so many times smaller, as a layer of so many times the entries would see them.

    For measuring memory only: results are not those of a solve.
    """
    token = _divisor.set(times)
    try:
        yield
    finally:
        _divisor.reset(token)
