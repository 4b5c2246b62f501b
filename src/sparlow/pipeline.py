"""The bridge: observe a decoder block, give each of its linear layers to an algorithm, put the answer in its place."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from sparlow.algorithms import check_budget, solve
from sparlow.allocation import Budget, matches
from sparlow.errors import InputError, RunError
from sparlow.linalg.gram import Gram, GramAccumulator, SquareAccumulator
from sparlow.model.blocks import Call, linears
from sparlow.model.layers import SparseLowRankLinear
from sparlow.model.observing import Observation, observe
from sparlow.model.offload import Shelf
from sparlow.model.recording import Recording
from sparlow.progress import Clock
from sparlow.recipe import Recipe
from sparlow.report import LayerRecord


def budgets(blocks_name: str, blocks: Iterable[nn.Module], recipe: Recipe) -> dict[str, Budget]:
    """Return what each layer may keep by its full name, those that stay dense left out, before the data have a say.

    Raises:
        InputError: Names the first layer that does not fit the recipe, or says that there is nothing to compress.
    """
    named = [(f"{blocks_name}.{i}.{n}", m) for i, block in enumerate(blocks) for n, m in linears(block).items()]
    if not named:
        raise InputError("There is no plain linear layer in the model's decoder blocks: nothing to compress.")
    for pattern in (*recipe.ignore, *(rule.match for rule in recipe.layers)):
        if not any(matches(pattern, name) for name, _ in named):
            raise InputError(f"No layer's name ends in {pattern!r}: the first is {named[0][0]}.")
    found = {}
    for name, linear in named:
        shape = (linear.out_features, linear.in_features)
        budget = recipe.budget(name, shape)
        if budget is None:
            continue
        try:
            check_budget(recipe.found_algorithm, shape, budget.pattern, budget.rank)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
        found[name] = budget
    if not found:
        raise InputError("The recipe ignores every layer: nothing to compress.")
    return found


def name_what_is_not_finite(blocks_name: str, blocks: Iterable[nn.Module], recording: Recording) -> None:
    """Walk the dense blocks until one gives NaN or infinity, and raise InputError with its first layer that does."""
    hidden = recording.hidden
    for i, block in enumerate(blocks):
        outputs = hidden.fresh()
        observe(block, recording.calls[i], hidden, SquareAccumulator, outputs=outputs, label=f"{blocks_name}.{i}")
        hidden = outputs


@torch.no_grad()
def compress_block(
    block: nn.Module,
    where: tuple[str, int],
    calls: Mapping[int, Call],
    hidden: Shelf,
    recipe: Recipe,
    budgets: Mapping[str, Budget],
    stored: torch.dtype,
    clock: Clock,
    on_layer: Callable[[LayerRecord], None],
    *,
    outputs: Shelf | None = None,
) -> list[LayerRecord]:
    """Replace the linear layers of one block by compressed ones.

    Args:
        block: A dense decoder block.
        where: Name of the list of blocks, and the number of this one.
        calls: How the block is called, by number of windows.
        hidden: Its inputs, (b, seqlen, d) each.
        recipe: What to do.
        budgets: What each layer may keep, by its full name; a layer that is not there stays dense.
        stored: Type that S, U, V are rounded to; the layers themselves compute in the block's.
        clock: Counts "statistics" and "solve".
        on_layer: Called with every finished layer.
        outputs: Takes the outputs of the dense block, (b, seqlen, d) each, if they are wanted.

    Returns:
        One record a layer.

    Raises:
        InputError: The block's numbers are not finite.
        RunError: A solver failed; the message names the layer.
    """
    name, index = where
    label = f"{name}.{index}"
    with clock("statistics"):
        seen = observe(block, calls, hidden, GramAccumulator, outputs=outputs, label=label)
    windows = sum(len(x) for x in hidden)
    records = []
    for layer, linear, gram, tokens in with_grams(block, seen, windows, recipe):
        budget = budgets.get(f"{label}.{layer}")
        if budget is None:
            continue
        with clock("solve"):
            try:
                record, compressed = _compress_layer(index, layer, linear, gram, tokens, recipe, budget, stored)
            except RunError as error:
                raise RunError(f"{label}.{layer}: {error}") from error
        block.set_submodule(layer, compressed)
        records.append(record)
        on_layer(record)
    return records


def with_grams(
    block: nn.Module, seen: Observation[GramAccumulator], windows: int, recipe: Recipe
) -> Iterator[tuple[str, nn.Linear, Gram, int]]:
    """Each linear, the damped Gram of its input and the tokens in that; layers that share one follow each other.

    Of a layer that no token reached it is the identity. A Gram is taken out of ``seen`` and freed after its layers. The
    widest comes last, when the others are gone: its solve needs the most memory.
    """
    layers = linears(block)
    reached = {name for name, owner in seen.owner.items() if seen.statistics[owner].tokens}
    for owner in sorted(seen.statistics, key=lambda name: layers[name].in_features):
        statistic = seen.statistics.pop(owner)
        tokens = statistic.tokens
        if not tokens:  # every input would count as dead
            continue
        H = statistic.second_moment(windows)
        gram = Gram.damped(H, absolute=recipe.damping, relative=recipe.relative_damping)
        del statistic, H
        for name in (name for name in layers if seen.owner.get(name) == owner):
            yield name, layers[name], gram, tokens
    for name in (name for name in layers if name not in reached):
        linear = layers[name]
        yield name, linear, Gram.identity(linear.in_features, linear.weight.device), 0


def _compress_layer(
    index: int,
    name: str,
    linear: nn.Linear,
    gram: Gram,
    tokens: int,
    recipe: Recipe,
    budget: Budget,
    stored: torch.dtype,
) -> tuple[LayerRecord, SparseLowRankLinear]:
    W = linear.weight.to(stored)  # exact: it came in this type
    found = solve(recipe.found_algorithm, W, gram, budget.pattern, budget.rank, recipe.parsed_options)
    record = LayerRecord(
        block=index,
        name=name,
        shape=(linear.out_features, linear.in_features),
        pattern=str(budget.pattern),
        density=(found.S != 0).float().mean().item(),
        rank=budget.rank,
        relative_error=float(found.stats["relative_error"]),
        iterations=int(found.stats["iterations"]),
        seconds=float(found.stats["seconds"]),
        damping=float(found.stats["damping"]),
        warnings=tuple(_warnings(found.stats, tokens)),
        tokens=tokens,
        dead_inputs=int(found.stats["dead_columns"]),
        settled=bool(found.stats.get("converged", True)),
    )
    bias = None if linear.bias is None else linear.bias.detach()
    S, U, V = (part.to(linear.weight.dtype) for part in (found.S, found.U, found.V))
    return record, SparseLowRankLinear(S, U, V, bias)


def _warnings(stats: Mapping[str, Any], tokens: int) -> Iterator[str]:
    if not tokens:
        yield "no calibration token reached this layer, so it was compressed without data"
    if stats["damping"]:
        yield f"a factorisation needed {stats['damping']:.1g} of extra damping"
    if stats["dead_columns"]:
        yield f"{stats['dead_columns']} input features were always zero; their weights were dropped"
    if not stats.get("converged", True):
        yield f"the solver had not settled after {stats['iterations']} iterations"
