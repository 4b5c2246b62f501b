"""Statistics of experts that have seen few tokens: shrunk towards those of all tokens of the layer.

An expert with fewer tokens than its input has features would be compressed for these tokens alone. So to its Σ x xᵀ are
added ``BORROWED`` · features tokens of the layer, all with the mean x xᵀ of the tokens that enter the layer: for n
tokens of its own the weight of that is BORROWED · features / (n + BORROWED · features), all for none and ever less for
more. What an expert computes within itself has no counterpart in others; there as many tokens with the same diagonal
and nothing beside it are added.
"""

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from sparlow.distributed import Processes
from sparlow.linalg.gram import GramAccumulator
from sparlow.model.forward.compressible import fused_of
from sparlow.model.forward.fused import FusedWeight
from sparlow.model.forward.fused_layout import caller_of
from sparlow.model.forward.input_statistics import Observation, Pool

BORROWED = 0.125  # tokens for each feature of an expert's input; docs/experts.md compares 0, 1/2 and shared Grams


def _role(name: str) -> str:
    return name.rpartition(".")[0]


def pools_of(block: nn.Module, names: Collection[str]) -> tuple[Pool, ...]:
    """Return what is to be observed beside some layers, so that the statistics of the experts among them can borrow."""
    wanted = {_role(name) for name in names}
    found: dict[str, Pool] = {}
    for role, fused in fused_of(block).items():
        pool = _pool(role, fused)
        if pool and role in wanted:
            found[pool.name] = pool
    return tuple(found.values())


def _pool(role: str, fused: FusedWeight) -> Pool | None:
    if not fused.layout.routed:
        return None
    return Pool(caller_of(_role(role), fused.layout), fused.matrix[0 if fused.layout.transposed else 1])


class Pools:
    """What experts may borrow from: the mean x xᵀ of all tokens that enter the modules that call them.

    Args:
        block: Whose experts were taken apart.
        seen: The statistics of one pass; those of pools are removed.
        processes: The processes that sum them.
    """

    def __init__(self, block: nn.Module, seen: Observation[Any], processes: Processes) -> None:
        self._fused = fused_of(block)
        self._means: dict[str, Tensor] = {}
        for name in {pool.name: None for role, fused in self._fused.items() if (pool := _pool(role, fused))}:
            if name in seen.owner:
                self._take(name, seen, processes)

    def _take(self, name: str, seen: Observation[Any], processes: Processes) -> None:
        owner = seen.owner.pop(name)
        shared = owner in seen.owner.values()  # with a layer that reads all tokens, as a shared expert does
        statistic: GramAccumulator = seen.statistics[owner] if shared else seen.statistics.pop(owner)
        (tokens,) = processes.totals([statistic.tokens])
        total = processes.all_reduce(statistic.sum.clone() if shared else statistic.sum)
        if tokens:
            self._means[name] = total.div_(tokens)

    def _of(self, layer: str) -> tuple[FusedWeight | None, Tensor | None]:
        """Return the fused weight that a layer is in, if it is an expert's, and what it may borrow from."""
        fused = self._fused.get(_role(layer))
        pool = _pool(_role(layer), fused) if fused else None
        return fused, self._means.get(pool.name) if pool else None

    def shrink(self, layer: str, total: Tensor, tokens: int) -> None:
        """Add what an expert borrows to its Σ x xᵀ (features, features), in place; nothing for other layers.

        Args:
            layer: Its name in the block.
            total: The sum over all processes.
            tokens: How many it is of.
        """
        fused, mean = self._of(layer)
        borrowed = BORROWED * len(total)
        if mean is not None:
            total.add_(mean, alpha=borrowed)
        elif fused and not fused.layout.routed:
            total.diagonal().mul_(1 + borrowed / tokens)

    def instead(self, layer: str) -> Tensor | None:
        """Return H (features, features) for an expert that no token reached; None where it has nothing to borrow."""
        _, mean = self._of(layer)
        if mean is None:
            return None
        statistic = GramAccumulator(len(mean), mean.device)
        statistic.sum = mean
        return statistic.second_moment(1)
