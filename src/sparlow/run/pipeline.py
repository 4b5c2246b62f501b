"""The bridge: observe a decoder block, give each of its linear layers to an algorithm, put the answer in its place."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict

import torch
from torch import Tensor, nn

from sparlow.algorithms import SolveStats, solve
from sparlow.distributed import ALONE, Processes
from sparlow.errors import RunError
from sparlow.linalg.gram import Gram, GramAccumulator, SquareAccumulator
from sparlow.model.artefact.bitmask import mask_bytes, pack, unpack
from sparlow.model.artefact.layers import SparseLowRankLinear
from sparlow.model.forward.activation_store import ActivationStore
from sparlow.model.forward.capture import Recording
from sparlow.model.forward.decoder import Call, linears
from sparlow.model.forward.input_statistics import Observation, collect_statistics
from sparlow.progress import Clock
from sparlow.recipe.allocation import Budget
from sparlow.recipe.recipe import Recipe
from sparlow.report.records import LayerRecord


def name_what_is_not_finite(blocks_name: str, blocks: Iterable[nn.Module], recording: Recording) -> None:
    """Walk the dense blocks until one gives NaN or infinity, and raise InputError with its first layer that does."""
    hidden = recording.hidden
    for i, block in enumerate(blocks):
        outputs = hidden.fresh()
        collect_statistics(
            block, recording.calls[i], hidden, SquareAccumulator, outputs=outputs, label=f"{blocks_name}.{i}"
        )
        hidden = outputs


@torch.no_grad()
def compress_block(
    block: nn.Module,
    where: tuple[str, int],
    calls: Mapping[int, Call],
    hidden: ActivationStore,
    recipe: Recipe,
    budgets: Mapping[str, Budget],
    stored: torch.dtype,
    clock: Clock,
    on_layer: Callable[[LayerRecord], None],
    *,
    outputs: ActivationStore | None = None,
    processes: Processes = ALONE,
) -> list[LayerRecord]:
    """Replace the linear layers of one block by compressed ones.

    Of several processes each sees its part of the text and solves its share of the layers; all end with the same block.

    Args:
        block: A dense decoder block.
        where: Name of the list of blocks, and the number of this one.
        calls: How the block is called, by number of windows.
        hidden: Its inputs, (b, seqlen, d) each.
        recipe: What to do.
        budgets: What each layer may keep, by its full name; a layer that is not there stays dense.
        stored: Type that S, U, V are rounded to; the layers themselves compute in the block's.
        clock: Counts "statistics" and "solve".
        on_layer: Called with every layer that this process has finished.
        outputs: Takes the outputs of the dense block, (b, seqlen, d) each, if they are wanted.
        processes: Those that share the work.

    Returns:
        One record a layer.

    Raises:
        InputError: The block's numbers are not finite.
        RunError: A solver failed; the message names the layer.
    """
    name, index = where
    label = f"{name}.{index}"
    with clock("statistics"):
        seen = collect_statistics(
            block, calls, hidden, GramAccumulator, outputs=outputs, label=label, processes=processes
        )
    layers = {n: linear for n, linear in linears(block).items() if f"{label}.{n}" in budgets}
    who = processes.assign({n: _cost(linear) for n, linear in layers.items()})
    found: dict[str, LayerRecord] = {}
    for layer, gram, tokens in with_grams(block, seen, recipe, who, processes):
        budget = budgets[f"{label}.{layer}"]
        with clock("solve"):
            try:
                found[layer], compressed = _compress_layer(
                    index, layer, layers[layer], gram, tokens, recipe, budget, stored
                )
            except RunError as error:
                raise RunError(f"{label}.{layer}: {error}") from error
        block.set_submodule(layer, compressed)
        on_layer(found[layer])
    if processes.size > 1:
        found = _exchanged(block, layers, found, who, stored, processes)
    return [found[layer] for layer in layers]


def _cost(linear: nn.Linear) -> float:
    """Of a solve, up to a factor: each iteration takes a product with H, and there are factorisations of it."""
    return float(linear.in_features**2 * (linear.out_features + linear.in_features))


def with_grams(
    block: nn.Module,
    seen: Observation[GramAccumulator],
    recipe: Recipe,
    who: Mapping[str, int],
    processes: Processes = ALONE,
) -> Iterator[tuple[str, Gram, int]]:
    """Each linear given to this process, the damped Gram of its input, and the tokens in that.

    Layers that share a Gram follow each other. Of a layer that no token reached it is the identity. A Gram is taken out
    of ``seen`` and freed after its layers. The widest comes last, when the others are gone: its solve needs the most
    memory.

    Args:
        block: Whose linears they are.
        seen: By one pass of the block, in each process over its part of the text.
        recipe: Whose damping.
        who: Number of the process that a linear is given to; one that is not there is given to none.
        processes: Those that add up what they have seen.
    """
    layers = linears(block)
    names = sorted(seen.statistics, key=lambda name: layers[name].in_features)
    windows, *counts = map(int, processes.totals([seen.windows, *(seen.statistics[name].tokens for name in names)]))
    tokens = dict(zip(names, counts, strict=True))
    for owner in names:
        statistic = seen.statistics.pop(owner)
        readers = [name for name in layers if name in who and seen.owner.get(name) == owner]
        # of no tokens, every input would count as dead
        wanted = tokens[owner] and processes.reduce_to(statistic.sum, {who[name] for name in readers})
        if not wanted:
            continue
        H = statistic.second_moment(windows)
        del statistic  # of the widest layer, each of these is the largest matrix there is
        gram = Gram.damped(H, absolute=recipe.damping, relative=recipe.relative_damping)
        del H
        for name in readers:
            if who[name] == processes.rank:
                yield name, gram, tokens[owner]
        del gram
    for name, rank in who.items():
        if rank == processes.rank and not tokens.get(seen.owner.get(name, ""), 0):
            linear = layers[name]
            yield name, Gram.identity(linear.in_features, linear.weight.device), 0


def _exchanged(
    block: nn.Module,
    layers: Mapping[str, nn.Linear],
    found: Mapping[str, LayerRecord],
    who: Mapping[str, int],
    stored: torch.dtype,
    processes: Processes,
) -> dict[str, LayerRecord]:
    """Put the layers that other processes have solved in their places too, sent as they are stored; all records."""
    own = {name: _as_stored(block.get_submodule(name), stored) for name in found}
    told = processes.all_gather({name: [asdict(found[name]), len(parts[0])] for name, parts in own.items()})
    records = {}
    for name, linear in layers.items():
        data, kept = told[who[name]][name]
        record = records[name] = LayerRecord.from_dict(data)
        parts = own.get(name) or _empty(linear, kept, record.rank, stored)
        for part in parts:
            if part.numel():
                processes.broadcast(part.view(torch.uint8), who[name])
        if name not in own:
            values, mask, U, V = parts
            S = unpack(values, mask, record.shape)
            bias = None if linear.bias is None else linear.bias.detach()
            dtype = linear.weight.dtype
            block.set_submodule(name, SparseLowRankLinear(S.to(dtype), U.to(dtype), V.to(dtype), bias))
    return records


def _as_stored(layer: nn.Module, stored: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values, mask, U and V of a compressed layer, as its shard will hold them."""
    if not isinstance(layer, SparseLowRankLinear):
        raise TypeError(type(layer))
    values, mask = pack(layer.S.detach().to(stored))
    return values, mask, layer.U.detach().to(stored).contiguous(), layer.V.detach().to(stored).contiguous()


def _empty(linear: nn.Linear, kept: int, rank: int, stored: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for what ``_as_stored`` gives of a layer in the place of ``linear``."""
    rows, columns = linear.weight.shape
    at = linear.weight.device
    mask = torch.empty(rows, mask_bytes(columns), dtype=torch.uint8, device=at)
    values, U, V = (torch.empty(shape, dtype=stored, device=at) for shape in ((kept,), (rows, rank), (rank, columns)))
    return values, mask, U, V


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
        relative_error=found.stats.relative_error,
        iterations=found.stats.iterations,
        seconds=found.stats.seconds,
        damping=found.stats.damping,
        warnings=tuple(_warnings(found.stats, tokens)),
        tokens=tokens,
        dead_inputs=found.stats.dead_columns,
        settled=found.stats.converged,
    )
    bias = None if linear.bias is None else linear.bias.detach()
    S, U, V = (part.to(linear.weight.dtype) for part in (found.S, found.U, found.V))
    return record, SparseLowRankLinear(S, U, V, bias)


def _warnings(stats: SolveStats, tokens: int) -> Iterator[str]:
    if not tokens:
        yield "no calibration token reached this layer, so it was compressed without data"
    if stats.damping:
        yield f"a factorisation needed {stats.damping:.1g} of extra damping"
    if stats.dead_columns:
        yield f"{stats.dead_columns} input features were always zero; their weights were dropped"
    if not stats.converged:
        yield f"the solver had not settled after {stats.iterations} iterations"
