"""Compress one decoder block: collect statistics, run the algorithm on each linear layer, replace the layers."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from sparlow.algorithms import Decomposition, SolveStats, solve
from sparlow.distributed import LostError
from sparlow.errors import RunError
from sparlow.linalg.gram import Gram, GramAccumulator, SquareAccumulator
from sparlow.machine import give_back
from sparlow.model.artefact.dtypes import StoredDtypes
from sparlow.model.artefact.layers import SparseLowRankLinear
from sparlow.model.artefact.stored_form import StoredForm
from sparlow.model.forward.activation_store import ActivationStore
from sparlow.model.forward.block_pass import BlockPass
from sparlow.model.forward.call_order import observe_dependences
from sparlow.model.forward.capture import Recording
from sparlow.model.forward.compressible import CompressibleWeight, experts_apart, fused_of
from sparlow.model.forward.decoder import Decoder
from sparlow.model.forward.fused_groups import in_groups
from sparlow.model.forward.input_statistics import Observation, Stage, collect_statistics
from sparlow.progress import Clock
from sparlow.recipe.allocation import Budget
from sparlow.recipe.recipe import Recipe
from sparlow.report.records import LayerRecord
from sparlow.report.value_types import MODEL
from sparlow.run.divided import ALL, solve_together, who_solves
from sparlow.run.exchange import exchange_layers
from sparlow.run.experts import Pools, pools_of

Sums = TypeVar("Sums", bound=GramAccumulator)


def name_what_is_not_finite(decoder: Decoder, blocks: Iterable[nn.Module], recording: Recording) -> None:
    """Run the dense blocks until one gives NaN or infinity, and raise InputError that names the first such layer."""
    hidden = recording.hidden
    for i, block in enumerate(blocks):
        outputs = hidden.fresh()
        collect_statistics(BlockPass(block, recording.calls[i], hidden, decoder.label(i)), SquareAccumulator, outputs)
        hidden = outputs


@torch.no_grad()
def compress_block(
    through: BlockPass,
    recipe: Recipe,
    budgets: Mapping[str, Budget],
    storage: StoredDtypes,
    clock: Clock,
    on_layer: Callable[[LayerRecord], None],
    outputs: ActivationStore | None = None,
) -> list[LayerRecord]:
    """Replace the layers of one block by compressed ones.

    Each of several processes runs its part of the text and solves its share of the layers. All end with the same block.

    Args:
        through: The dense block and its inputs.
        recipe: The recipe.
        budgets: What each layer may keep, by its full name. A layer without a budget stays dense.
        storage: The types that S, U, V are rounded to. The layers themselves compute in the block's type.
        clock: Counts "statistics" and "solve".
        on_layer: Called with every layer that this process has finished.
        outputs: Where to put the outputs of the dense block, (windows, seqlen, …) each. If left out, they are not kept.

    Returns:
        One record for each layer.

    Raises:
        InputError: The block's numbers are not finite.
        RunError: A solver failed, or the block's numbers are not finite once layers are compressed; the message names
            the layer.
    """
    experts_apart(through.block, {name for name in through.weights if through.layer_name(name) in budgets})
    weights = {name: weight for name, weight in through.weights.items() if through.layer_name(name) in budgets}
    found: dict[str, LayerRecord] = {}
    waiting: dict[str, SparseLowRankLinear] = {}  # compressed, while others are still to see the dense block

    def end_stage(who: Mapping[str, int]) -> None:
        for name in list(waiting):
            weights[name].put(waiting.pop(name))
        if through.processes.size > 1:
            found.update(_from_others(through, weights, found, who, storage))

    with clock("statistics"):
        give_back()
        stages, why = _stages(through, recipe, weights)
    who: dict[str, int] = {}  # solves each layer

    def divide(seen: Observation[GramAccumulator], names: Iterable[str]) -> Mapping[str, int]:
        among = {name: (weights[name], budgets[through.layer_name(name)]) for name in names}
        by_rows = recipe.found_algorithm.divides_rows(recipe.parsed_options)
        who.update(who_solves(through.processes, among, seen.owner, by_rows=by_rows))
        return {name: who[name] for name in among}

    for seen, alone in _grams_by_stage(through, recipe, weights, stages, outputs, clock, divide, end_stage):
        name, full = seen.layer, through.layer_name(seen.layer)
        weight, budget, stored = weights[name], budgets[full], storage.of_layer(full)
        with clock("solve"), _naming(full):
            give_back()  # what statistics and the solve before have freed
            W = weight.read().to(stored)  # exact: it came in this type
            solver = _solver(recipe, budget, seen.gram)
            answer = solve_together(through.processes, W, solver) if who[name] == ALL else solver(W)
            del W, solver
            found[name] = _record(through.number, weight, budget, answer, seen.tokens)
            waiting[name] = _layer(weight, answer, stored)
            if alone:
                weight.put(waiting.pop(name))
            del answer, seen  # what comes next needs the memory
        on_layer(found[name])
    return _with_reason([found[name] for name in weights], why)


def _layer(weight: CompressibleWeight, answer: Decomposition, stored: torch.dtype) -> SparseLowRankLinear:
    S, U, V = (part.to(weight.dtype) for part in (answer.S, answer.U, answer.V))
    layer = SparseLowRankLinear(S, U, V, weight.bias)
    if answer.values or answer.factors:
        layer.stored = StoredForm(answer.values, answer.factors, stored)
    return layer


def _stages(
    through: BlockPass, recipe: Recipe, weights: Mapping[str, CompressibleWeight]
) -> tuple[list[Stage | None], str]:
    """Return what is observed in each pass, None for all layers, and why there is only one where more were wanted."""
    if recipe.behind == "blocks":
        return [None], ""
    stages, why = observe_dependences(through, weights).stages(weights)
    return [*stages], why


def _grams_by_stage(
    through: BlockPass,
    recipe: Recipe,
    weights: Mapping[str, CompressibleWeight],
    stages: Sequence[Stage | None],
    outputs: ActivationStore | None,
    clock: Clock,
    divide: Callable[[Observation[GramAccumulator], Iterable[str]], Mapping[str, int]],
    end_stage: Callable[[Mapping[str, int]], None],
) -> Iterator[tuple["Seen", bool]]:
    """Yield what ``with_grams`` does, stage by stage: each is observed after the layers before it were replaced.

    With each comes whether the layer may be replaced at once. A stage whose statistics would not fit beside each other
    is observed in several passes, of which all are to see the same block.

    ``outputs`` takes those of the first pass, in which the whole block is dense; ``divide`` says who solves what, and
    ``end_stage`` is told.
    """
    for number, stage in enumerate(stages):
        names = [*weights] if stage is None else [*stage.names]
        groups = in_groups({name: weights[name].shape[1] for name in names}, fused_of(through.block))
        who: dict[str, int] = {}
        for i, group in enumerate(groups):
            some = Stage(tuple(group)) if stage is None else replace(stage, names=tuple(group))
            pools = pools_of(through.block, group)
            with clock("statistics"):
                wanted = None if number or i else outputs
                seen = collect_statistics(through, GramAccumulator, wanted, replace(some, pools=pools))
            own = divide(seen, group)
            who |= own
            for found in with_grams(through, seen, recipe, own):
                yield found, len(groups) == 1
        end_stage(who)


def _from_others(
    through: BlockPass,
    weights: Mapping[str, CompressibleWeight],
    found: Mapping[str, LayerRecord],
    who: Mapping[str, int],
    storage: StoredDtypes,
) -> Mapping[str, LayerRecord]:
    """Send this process's layers to all others, and take theirs; each has those already that all have solved."""
    through.processes.part()
    one_has = {name: weights[name] for name, rank in who.items() if rank != ALL}
    own = {name: found[name] for name in one_has if name in found}
    return exchange_layers(through, one_has, own, who, storage)


@contextmanager
def _naming(layer: str) -> Iterator[None]:
    """Say which layer it was whose solve failed."""
    try:
        yield
    except LostError:  # no fault of the layer's
        raise
    except RunError as error:
        raise RunError(f"{layer}: {error}") from error


def _solver(recipe: Recipe, budget: Budget, gram: Gram) -> Callable[[Tensor], Decomposition]:
    """Return what solves rows of a weight that reads the input of this Gram."""
    return partial(
        solve,
        recipe.found_algorithm,
        gram=gram,
        pattern=budget.pattern,
        rank=budget.rank,
        options=recipe.parsed_options,
        **budget.on_grid,
    )


def _with_reason(records: list[LayerRecord], why: str) -> list[LayerRecord]:
    """Put into the first record why no layer of the block was compressed behind the others."""
    if not why:
        return records
    warning = f"The layers of this block were not compressed behind each other, because {why}."
    return [replace(records[0], warnings=(*records[0].warnings, warning)), *records[1:]]


@dataclass(frozen=True)
class Seen:
    """What the text showed of the input of a layer.

    Attributes:
        layer: Its name within the block.
        gram: Of its input, damped.
        tokens: Number of tokens in that.
    """

    layer: str
    gram: Gram
    tokens: int


def with_grams(
    through: BlockPass,
    seen: Observation[Sums],
    recipe: Recipe,
    who: Mapping[str, int],
) -> Iterator[Seen]:
    """Yield each layer of this process with the damped Gram of its input.

    Layers that share a Gram follow each other. If no token reached a layer, its Gram is that of the tokens that
    ``experts.Pools`` has for it, or the identity. Statistics are removed from ``seen``. All of them have gone to the
    processes that want them before the first Gram is yielded, so that no process waits for another one's solve. The
    widest Gram comes last, when the others have been freed, because its solve needs the most memory; behind it come
    those of layers that all processes solve together.

    Args:
        through: The block, and the processes that sum their statistics.
        seen: The statistics of one pass, in each process over its part of the text.
        recipe: Says the damping.
        who: The number of the process that solves each layer, or ``ALL``. A layer that is not here is not solved.
    """
    weights, processes = through.weights, through.processes
    pools = Pools(through.block, seen, processes)
    names = sorted(seen.statistics, key=lambda name: len(seen.statistics[name].sum))
    windows, *counts = map(int, processes.totals([seen.windows, *(seen.statistics[name].tokens for name in names)]))
    tokens = dict(zip(names, counts, strict=True))

    def damped(H: Tensor, sample: Tensor | None = None) -> Gram:
        return Gram.damped(H, absolute=recipe.damping, relative=recipe.relative_damping, sample=sample)

    readers: dict[str, list[str]] = {owner: [] for owner in names}
    for name in (name for name in weights if name in who and name in seen.owner):
        readers[seen.owner[name]].append(name)
    for owner in names:  # of no tokens, every input would count as dead
        wanting = {who[name] for name in readers[owner]}
        wanting = {*range(processes.size)} if ALL in wanting else wanting
        if tokens[owner] and processes.reduce_to(seen.statistics[owner].sum, wanting):
            pools.shrink(owner, seen.statistics[owner].sum, tokens[owner])
        else:
            del seen.statistics[owner]
    together = {owner for owner in names if any(who[name] == ALL for name in readers[owner])}
    for owner in sorted((owner for owner in names if owner in seen.statistics), key=lambda owner: owner in together):
        statistic = seen.statistics.pop(owner)
        H = statistic.second_moment(windows)
        sample = statistic.sample.rows  # of this process's part of the text
        del statistic  # of the widest layer, each of these is the largest matrix there is
        gram = damped(H, sample)
        del H
        for name in readers[owner]:
            if who[name] in (processes.rank, ALL):
                yield Seen(name, gram, tokens[owner])
        del gram
    for name, rank in who.items():
        if rank in (processes.rank, ALL) and not tokens.get(seen.owner.get(name, ""), 0):
            borrowed, weight = pools.instead(name), weights[name]
            identity = Gram.identity(weight.shape[1], weight.device)
            yield Seen(name, identity if borrowed is None else damped(borrowed), 0)


def _record(block: int, weight: CompressibleWeight, budget: Budget, found: Decomposition, tokens: int) -> LayerRecord:
    return LayerRecord(
        block=block,
        name=weight.name,
        shape=weight.shape,
        pattern=str(budget.pattern),
        density=(found.S != 0).float().mean().item(),
        rank=budget.rank,
        relative_error=found.stats.relative_error,
        relative_error_per_token=found.stats.relative_error_per_token,
        iterations=found.stats.iterations,
        seconds=found.stats.seconds,
        damping=found.stats.damping,
        warnings=tuple(_warnings(found.stats, tokens)),
        tokens=tokens,
        dead_inputs=found.stats.dead_columns,
        settled=found.stats.converged,
        value_type=budget.value_type,
        levels=budget.grid.levels if budget.grid else None,
        group=budget.grid.group if budget.grid else None,
        factor_type="int8" if budget.int8_factors and budget.rank else MODEL,
        trace=found.stats.trace,
    )


def _warnings(stats: SolveStats, tokens: int) -> Iterator[str]:
    if not tokens:
        yield "No calibration token reached this layer, so it was compressed without data of its own."
    if stats.damping:
        yield f"A factorisation needed {stats.damping:.1g} of extra damping."
    if stats.dead_columns:
        yield f"{stats.dead_columns} input features were always zero, so their weights were dropped."
    if not stats.converged:
        yield f"The solver had not settled after {stats.iterations} iterations."
