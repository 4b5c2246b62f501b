"""One pass over the dense blocks before any is compressed, to measure what the data-driven allocations need."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from sparlow.distributed import ALONE, Processes
from sparlow.linalg.error_curves import error_curve
from sparlow.linalg.gram import EvenGramAccumulator, SquareAccumulator
from sparlow.linalg.patterns import Unstructured
from sparlow.model.artefact.dtypes import StoredDtypes
from sparlow.model.forward.block_pass import BlockPass
from sparlow.model.forward.capture import Recording
from sparlow.model.forward.compressible import compressible, experts_apart
from sparlow.model.forward.decoder import Decoder
from sparlow.model.forward.fused_layout import put_together
from sparlow.model.forward.input_statistics import Kind, Observation, Stage, collect_statistics
from sparlow.recipe.allocation import Budget, Offer, cost, error_driven, offered, owl_densities, require_total
from sparlow.recipe.recipe import Recipe
from sparlow.run.experts import pools_of
from sparlow.run.pipeline import with_grams


@dataclass(frozen=True)
class DenseWalk:
    """What one pass over the dense blocks needs.

    Attributes:
        decoder: The chain of blocks.
        blocks: All of them, dense, of which one at a time is needed.
        recording: What enters the first, and how each is called.
        advance: Called with 1 after every block.
        processes: Those that divide the text.
    """

    decoder: Decoder
    blocks: Iterable[nn.Module]
    recording: Recording
    advance: Callable[[int], None]
    processes: Processes = ALONE

    def observed(
        self, statistic: Callable[[int, torch.device], Kind], *, pooled: bool = False
    ) -> Iterator[tuple[BlockPass, Observation[Kind]]]:
        """Yield each block with its inputs and the statistics of one pass, ``pooled`` with what experts borrow from."""
        hidden = self.recording.hidden
        for i, block in enumerate(self.blocks):
            outputs = hidden.fresh()
            names = compressible(block)
            experts_apart(block, names)
            stage = Stage(tuple(names), pools=pools_of(block, names) if pooled else ())
            through = BlockPass(block, self.recording.calls[i], hidden, self.decoder.label(i), i, self.processes)
            yield through, collect_statistics(through, statistic, outputs, stage)
            put_together(block)
            hidden = outputs
            self.advance(1)


@torch.no_grad()
def allocate_by_data(
    walk: DenseWalk, recipe: Recipe, budgets: Mapping[str, Budget], storage: StoredDtypes
) -> dict[str, Budget]:
    """Return the budgets that ``recipe.allocate`` derives from the data. Layers that a rule decides are left alone.

    Args:
        walk: The dense model and its inputs.
        recipe: The recipe.
        budgets: What each layer may keep without allocation, by its full name.
        storage: The types of the result.
    """
    if recipe.allocate == "owl":
        return _outlier_weighed(walk, recipe, budgets)
    return _error_driven(walk, recipe, budgets, storage)


def _outlier_weighed(walk: DenseWalk, recipe: Recipe, budgets: Mapping[str, Budget]) -> dict[str, Budget]:
    """An outlier is a score |W_ij|·√H_jj above M times the mean over all layers of its block (arXiv 2310.05175)."""
    shares: dict[str, float] = {}
    for through, seen in walk.observed(SquareAccumulator):
        sums = {owner: walk.processes.all_reduce(statistic.sum) for owner, statistic in seen.statistics.items()}
        norms = {name: sums[owner].sqrt().float() for name, owner in seen.owner.items()}
        weights = through.weights
        scores = torch.cat([(weights[name].read().float().abs() * norm).flatten() for name, norm in norms.items()])
        shares[through.label] = (scores > recipe.owl_threshold * scores.mean()).float().mean().item()
    free = {label: _free_of_rules(label, recipe, budgets) for label in shares}
    shapes = {name: weight.shape for name, weight in walk.decoder.layers()}
    sizes = {label: sum(math.prod(shapes[name]) for name in names) for label, names in free.items() if names}
    given = [shares[label] for label in sizes]
    densities = owl_densities(given, [*sizes.values()], 1 - recipe.pattern_of_all.density, recipe.owl_spread)
    found = {
        name: replace(budgets[name], pattern=Unstructured(round(1 - density, 12)))
        for label, density in zip(sizes, densities, strict=True)
        for name in free[label]
    }
    asked = sum(budgets[name].values(shapes[name]) for name in found)
    require_total([budget.values(shapes[name]) for name, budget in found.items()], asked)
    return found


def _free_of_rules(label: str, recipe: Recipe, budgets: Mapping[str, Budget]) -> list[str]:
    """The layers of a block whose pattern no rule decides."""
    return [name for name in budgets if name.startswith(f"{label}.") and not recipe.rules_pattern(name)]


def _error_driven(
    walk: DenseWalk, recipe: Recipe, budgets: Mapping[str, Budget], storage: StoredDtypes
) -> dict[str, Budget]:
    """Assign ranks and densities where the layers' relative errors fall most for what they cost, for the same total.

    Each token counts by its own size here: where a few are huge, a layer would look done as soon as they are right.
    Solvers see to those, as they work on what the tokens add up to.
    """
    low_rank = recipe.found_algorithm.kind != "pruner"
    offers: dict[str, list[Offer]] = {}
    costs: dict[str, Callable[[Budget], int]] = {}
    for through, seen in walk.observed(EvenGramAccumulator, pooled=True):
        names = {n: through.layer_name(n) for n in through.weights}
        free = {n: w for n, w in through.weights.items() if names[n] in budgets and not recipe.has_rule(names[n])}
        sizes = {n: storage.of_layer(names[n]).itemsize for n in free}
        asked = {n: offered(budgets[names[n]], weight.shape, sizes[n], low_rank=low_rank) for n, weight in free.items()}
        who = walk.processes.assign({n: float(math.prod(weight.shape)) for n, weight in free.items()})
        errors = {
            n: [
                error_curve(free[n].read().float(), gram, pattern, ranks, budgets[names[n]].grid)
                for pattern, ranks in asked[n].items()
            ]
            for n, gram in ((one.layer, one.gram) for one in with_grams(through, seen, recipe, who))
        }
        walk.processes.part()
        errors = {n: curves for own in walk.processes.all_gather(errors) for n, curves in own.items()}
        for n, weight in free.items():
            price = costs[names[n]] = partial(cost, shape=weight.shape, size=sizes[n])
            offers[names[n]] = [
                Offer(budget, price(budget), error)
                for (pattern, ranks), curve in zip(asked[n].items(), errors[n], strict=True)
                for rank, error in zip(ranks, curve, strict=True)
                for budget in (replace(budgets[names[n]], pattern=pattern, rank=rank),)
            ]
    total = sum(price(budgets[name]) for name, price in costs.items())
    found = error_driven(offers, total)
    fewer = any(budget.grid or budget.int8_factors for budget in found.values())
    kept = [price(found[name]) for name, price in costs.items()]
    require_total(kept, total, "bytes" if fewer else "values", exactly=False)
    return found
