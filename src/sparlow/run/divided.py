"""Solve one weight in several processes, each of which has some of its rows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparlow.algorithms import Decomposition
from sparlow.distributed import Processes
from sparlow.linalg.shared_rows import sharing
from sparlow.model.forward.compressible import CompressibleWeight
from sparlow.recipe.allocation import Budget

ALL = -1  # in the place of a process's number: all of them together


@dataclass(frozen=True)
class DividedRows:
    """The rows of a weight over processes: consecutive ones, as even as possible. See ``linalg.shared_rows.Rows``.

    Attributes:
        processes: Those that share it.
        count: Rows of the whole weight.
    """

    processes: Processes
    count: int

    @property
    def rank(self) -> int:
        """Number of this process."""
        return self.processes.rank

    @property
    def size(self) -> int:
        """How many there are."""
        return self.processes.size

    def sent(self, tensor: Tensor, source: int) -> Tensor:
        """Copy a tensor to all others, in place."""
        return self.processes.broadcast(tensor.contiguous(), source)

    def rows(self, rank: int) -> slice:
        """The rows of a process."""
        size = self.processes.size
        each, more = divmod(self.count, size)
        start = rank * each + min(rank, more)
        return slice(start, start + each + (rank < more))

    def own(self, whole: Tensor) -> Tensor:
        """Return this process's rows."""
        return whole[self.rows(self.processes.rank)]

    def summed(self, number: float) -> float:
        """Add up a number."""
        return self.processes.totals([number])[0]

    def total(self, part: Tensor) -> Tensor:
        """Add up a tensor, in place."""
        if not part.numel():
            return part
        return self.processes.all_reduce(part.contiguous())

    def maximum(self, part: Tensor) -> Tensor:
        """Return the largest of each entry."""
        if not part.numel():
            return part
        everyone = part.new_zeros(self.processes.size, *part.shape)
        everyone[self.processes.rank] = part
        return self.processes.all_reduce(everyone).amax(0)

    def gathered(self, part: Tensor) -> Tensor:
        """Return all rows, exactly as each process has them."""
        if part.dtype == torch.float32:  # one exchange, and numbers that zeros are added to stay what they are
            whole = part.new_zeros(self.count, *part.shape[1:])
            self.own(whole).copy_(part)
            return self.total(whole)
        whole = part.new_empty(self.count, *part.shape[1:])
        self.own(whole).copy_(part)
        for rank in range(self.processes.size):
            some = whole[self.rows(rank)]
            if some.numel():
                self.processes.broadcast(some, rank)
        return whole


def solve_together(processes: Processes, W: Tensor, solving: Callable[[Tensor], Decomposition]) -> Decomposition:
    """Solve a weight (out, in), each process its own rows; all get the whole result.

    Args:
        processes: All of them call this for the same weight.
        W: The whole weight.
        solving: Solves some rows of it.
    """
    rows = DividedRows(processes, len(W))
    processes.part()  # each has solved others by itself
    with sharing(rows):
        found = solving(rows.own(W))
    values = found.values and replace(found.values, scale=rows.gathered(found.values.scale))
    return replace(found, S=rows.gathered(found.S), U=rows.gathered(found.U), values=values)


def who_solves(
    processes: Processes,
    layers: Mapping[str, tuple[CompressibleWeight, Budget]],
    owner: Mapping[str, str],
    *,
    by_rows: bool,
) -> dict[str, int]:
    """Return the number of the process that solves each layer, or ``ALL`` for one whose rows are divided.

    Divided are layers that cost more than each process's fair share, because they would keep all others waiting. With
    them are those that read the same input, so that its Gram is needed once.

    Args:
        processes: Those that share the work.
        layers: Of one stage, by name.
        owner: For each layer that was seen the key of its input.
        by_rows: Whether what solves them can solve some rows of a weight, see ``Algorithm.divides_rows``.
    """
    costs = {name: cost(weight.shape) for name, (weight, _) in layers.items()}
    fair = sum(costs.values()) / processes.size
    groups: dict[str, list[str]] = {}
    for name in layers:
        groups.setdefault(owner.get(name, name), []).append(name)
    together = {
        name
        for group in groups.values()
        for name in group
        if by_rows
        and max(costs[other] for other in group) > fair
        and all(_divisible(layers[other][1], layers[other][0].shape[0], processes) for other in group)
    }
    whole = processes.assign({name: costs[name] for name in layers if name not in together})
    return {name: ALL if name in together else whole[name] for name in layers}


def cost(shape: tuple[int, int]) -> float:
    """Return the cost of a solve up to a constant: every iteration multiplies by H, which is also factorised."""
    out, features = shape
    return float(features**2 * (out + features))


def _divisible(budget: Budget, rows: int, processes: Processes) -> bool:
    """Whether several processes can solve a layer of so many rows together, and find what one would find.

    A pattern that chooses among the entries of all rows would need all of them.
    """
    alone = budget.pattern.group is not None or budget.pattern.density == 1
    fits = processes.size > 1 and rows // processes.size >= max(budget.rank, 1)
    return alone and fits
