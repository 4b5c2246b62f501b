"""The n-th largest of every group of m numbers, many groups at a time.

A selection network: sorted lists are merged until two are left, and in those the n-th largest is looked up. It takes
nothing but element-wise minima and maxima of long contiguous stretches, which is what processors do fastest. Merged is
by odd and even places, as Batcher does, which works for lists of any lengths (Knuth, The Art of Computer Programming 3,
section 5.3.4). Half of 16 takes 91 minima and maxima a group, half of 32 takes 283. They are laid out once, for cutting
tensors takes longer than comparing them.

Below, a list is a Python list of tensors, largest first: tensor i holds place i of many lists, one after another. So
one operation compares all of them, and cutting the tensors in two makes two sets of lists that can be merged.
"""

import math
from collections.abc import Callable
from itertools import pairwise, zip_longest

import torch
from torch import Tensor

Step = tuple[Callable[..., Tensor], Tensor, Tensor, Tensor]  # what is done, of x and y, and where the result goes


class Selection:
    """A network with the memory that it works in.

    Args:
        n: What is looked for, from 1 to m.
        m: Members of a group.
        shape: In which groups come.
        like: Tensor of the type and on the device that numbers have.
    """

    def __init__(self, n: int, m: int, shape: tuple[int, ...], like: Tensor) -> None:
        self._shape, self._steps = shape, list[Step]()
        count, groups = m if m % 2 else m // 2, math.prod(shape)
        self._first = [like.new_empty(count, *shape) for _ in range(m // count)]  # see __call__
        self._free = [like.new_empty((count + 1) // 2 * groups)]
        lists = [tensor.view(-1) for tensor in self._first]
        while count % 2 == 0 and count > 2:  # noqa: PLR2004 - the last two lists are not merged
            self._cut_free(len(lists[0]) // 2)
            lists = self._merge(*_parts(lists, 2))[:n]
            count //= 2
        merged, *others = _parts(lists, count)
        self._cut_free(groups)
        for other in others[:-1]:
            merged = self._merge(merged, other)[:n]
        self._found = self._look_up(merged, others[-1], n) if others else merged[n - 1]

    def __call__(self, members: Tensor) -> Tensor:
        """Return the n-th largest of every group, in memory that the next call overwrites.

        Args:
            members: (m, …) in any order of memory: the first members of all groups, then the second ones, and so on.
        """
        if len(self._first) == 1:
            self._first[0].copy_(members)
        else:  # the first comparison reads them where they are
            larger, smaller = self._first
            torch.maximum(members[: len(larger)], members[len(larger) :], out=larger)
            torch.minimum(members[: len(larger)], members[len(larger) :], out=smaller)
        for compare, x, y, out in self._steps:
            compare(x, y, out=out)
        return self._found.view(self._shape)

    def _cut_free(self, length: int) -> None:
        """Cut free memory into pieces of this length."""
        self._free = [piece for tensor in self._free for piece in tensor.split(length) if len(piece) == length]

    def _merge(self, a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
        """Merge two lists: those of their odd places and those of their even ones, then neighbours are compared."""
        if not a or not b:
            return a or b
        if len(a) == len(b) == 1:
            return self._ordered(a[0], b[0])
        largest, *odd = self._merge(a[::2], b[::2])
        even = self._merge(a[1::2], b[1::2])
        merged = [largest]
        for x, y in zip_longest(even, odd):
            merged += self._ordered(x, y) if x is not None and y is not None else [y if x is None else x]
        return merged

    def _ordered(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """The larger and the smaller one of each pair."""
        smaller = self._free.pop()
        self._steps += [(torch.minimum, x, y, smaller), (torch.maximum, x, y, x)]
        self._free.append(y)
        return [x, smaller]

    def _look_up(self, a: list[Tensor], b: list[Tensor], n: int) -> Tensor:
        """The n-th largest of two lists: the most that an i-th of one and an (n − i)-th of the other both reach."""
        both = range(max(n - len(b), 1), min(n - 1, len(a)) + 1)
        self._steps += [(torch.minimum, a[i - 1], b[n - i - 1], a[i - 1]) for i in both]
        reached = [a[i - 1] for i in both] + [one[n - 1] for one in (a, b) if len(one) >= n]
        self._steps += [(torch.maximum, x, y, y) for x, y in pairwise(reached)]
        return reached[-1]


def _parts(lists: list[Tensor], count: int) -> list[list[Tensor]]:
    """Cut every tensor into so many parts; a part of each belongs together."""
    return [list(part) for part in zip(*(tensor.chunk(count) for tensor in lists), strict=True)]
