"""Which pattern, values and ranks so many bits a weight buy: the rule behind ``--bits`` and ``--size``.

Bits count all of a compressed weight: codes or values, mask, scales, book, U and V with their scales. The rule was
measured on SmolLM2 (135M, one shot), at equal bits, by the errors of layers (``benchmarks/bits.py``):

* From 3.13 bits on every entry is kept, on the grid of most bits that fits: up to 8 bits every other form has 1.4 to
  2.4 times the error. Zeros beside values of few bits do not pay where all entries could be kept: int3 of all entries
  and nothing else (3.15 bits) has 0.8 of the error of 19:32 in int3 with a rank of 9.
* Where int3 does not fit, but N:32 of it with N of at least 17 and 0.1 bits for the rank (2.9 bits), that has 0.83 of
  the error of all entries in int2 with a rank of 32; at 2.75 bits it has none of that gain.
* A low-rank part pays: at int3 0.23 bits of it halve the layers' errors. It may be empty where more bits of the values
  are had instead: int4 without has half the error of int3 with a rank of 32.
* What is left goes to the rank, the same in all layers up to a quarter of their shorter side: that of a small layer
  takes fewer bytes, and lowers its error by as much (at int3 rank 16 takes o_proj to 0.58 of it, gate_proj to 0.66).
  Beyond three quarters of a bit a finer scale pays as much, so groups are halved then.
* Below 2.2 bits N:32 in int2.
* Values in the model's own type want N:32 with about a fifth of what the mask leaves for the low-rank part: 13:32 with
  a rank of a fourteenth of the width, where 16:32 and a small rank take the same bits. There the rank of a larger layer
  is larger, as the 0.6th power of out · in / (out + in): at 9.74 bits 55, 44 and 29 for layers of 576 × 1536,
  576 × 576 and 192 × 576 end at a divergence of 0.228 from the dense model on held-out text, 48 for all at 0.240.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from sparlow.errors import InputError
from sparlow.linalg.grid import Grid, make_grid
from sparlow.linalg.patterns import NM, Pattern, Unstructured
from sparlow.recipe.allocation import Budget, Shape
from sparlow.report.value_types import MODEL

VALUES = ("int8", "int4", "int3", "int2")  # most bits first
GROUPS = ("128", "64", "32")  # columns that share a scale, the cheapest first
DEFAULT_GROUP = GROUPS[0]
LEAST_FOR_RANK = {"int8": 0.0, "int4": 0.0, "int3": 0.0, "int2": 0.07}  # bits, where all entries are kept
LEAST_BESIDE_ZEROS = 0.1  # bits, where values on a grid are pruned
PRUNED = "int3"  # pays beside zeros before all entries of fewer bits do
LEAST_OF_PRUNED = 17  # of 32 columns
MOST_FOR_RANK = 0.75  # bits, before groups are halved
SHARE_OF_RANK = 0.2  # of the bits that a mask leaves, beside values in the model's type
RANK_BY_SIZE = 0.6  # power, beside values in the model's type
SPARSE = 32  # columns of a group in which N are kept
SMALLER = (16, 8, 4)  # where 32 does not divide the inputs of a layer
WHOLE = Unstructured(0.0)
SHORTEST = 4  # a rank is first at most this part of a layer's shorter side


@dataclass(frozen=True)
class Asked:
    """What a choice must keep to.

    Attributes:
        bits: A weight, over all layers.
        low_rank: Whether the method has a low-rank part.
        pattern: Of S; None to choose.
        values: Type of the values; None to choose.
        levels: Of a grid.
        group: Columns that share a scale; None to choose.
        factors: ``auto``, ``model`` or ``int8``.
        rank: Of every layer; None to choose.
    """

    bits: float
    low_rank: bool = True
    pattern: Pattern | None = None
    values: str | None = None
    levels: str = "auto"
    group: str | None = None
    factors: str = "auto"
    rank: int | None = None

    @property
    def chooses_rank(self) -> bool:
        """Whether ranks take what is left."""
        return self.low_rank and self.rank is None

    def form(self, pattern: Pattern, values: str, group: str | None = None) -> "Form":
        """The form of this pattern and these values, with the rest as asked for."""
        grid = make_grid(values, self.levels, group or self.group or DEFAULT_GROUP)
        int8 = self.low_rank and (self.factors == "int8" or (self.factors == "auto" and grid is not None))
        return Form(pattern, grid, int8, given=pattern == self.pattern)


@dataclass(frozen=True)
class Layer:
    """A layer that is to be compressed.

    Attributes:
        shape: (out, in).
        size: Bytes of a number that lies on no grid.
        ruled: What a rule makes of the budget that the layer would get; None where there is no rule.
        bias: Bytes of its bias, which count with it.
    """

    shape: Shape
    size: int
    ruled: Callable[[Budget], Budget] | None = None
    bias: int = 0

    @cached_property
    def weights(self) -> int:
        """Entries of W."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Form:
    """What the layers of one choice share.

    Attributes:
        pattern: Of S.
        grid: Of its values; None for the model's type.
        int8: Whether U and V are in int8.
        given: The pattern was asked for, so it is taken as it is.
    """

    pattern: Pattern
    grid: Grid | None
    int8: bool
    given: bool = False

    def budget(self, columns: int, rank: int = 0) -> Budget:
        """The budget of a layer of so many inputs: where 32 does not divide them, N of a smaller group or of all."""
        pattern = self.pattern
        if isinstance(pattern, NM) and not self.given and columns % pattern.m:
            size = next((size for size in SMALLER if columns % size == 0), 0)
            kept = pattern.n * size // pattern.m
            pattern = NM(kept, size) if kept else Unstructured(1 - pattern.density)
        return Budget(pattern, rank, self.grid, self.int8)


@dataclass(frozen=True)
class Choice:
    """A form fitted to layers.

    Attributes:
        form: It.
        budgets: By the names of the layers.
        bytes: Of all of them.
        weights: Entries of all their W.
    """

    form: Form
    budgets: Mapping[str, Budget]
    bytes: int
    weights: int

    @property
    def bits(self) -> float:
        """A weight."""
        return 8 * self.bytes / self.weights

    def __str__(self) -> str:
        """One phrase: ``dense, int4 half, 128 columns a scale, ranks 9 to 20 (4.49 bits)``."""
        ranks = sorted({budget.rank for budget in self.budgets.values()})
        low_rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        pattern = "dense" if self.form.pattern == WHOLE else str(self.form.pattern)
        values = self.form.budget(SPARSE).shown_values
        values = "the model's values" if values == MODEL else values
        return f"{pattern}, {values}, {low_rank} ({self.bits:.2f} bits)"


def pick(layers: Mapping[str, Layer], asked: Asked) -> Choice:
    """Choose the form for so many bits, and the rank of each layer.

    Args:
        layers: By name.
        asked: What the choice must keep to. All layers together never take more bits.

    Raises:
        InputError: Not even the smallest form takes so few bits, or the dense weights take no more.
    """
    dense = 8 * sum(layer.weights * layer.size for layer in layers.values()) / sum(_weights(layers))
    if asked.bits >= dense:
        raise InputError(
            f"The dense weights take {dense:g} bits each, so {asked.bits:g} would save nothing. Ask for fewer."
        )
    forms = [*_candidates(asked)]
    for form in forms:
        found = _fitted(form, layers, asked, _least_for_rank(form, asked))
        if found:
            return _finer(found, layers, asked)
    found = _fitted(forms[-1], layers, asked, 0)  # of fewest bits
    if found is None:
        least = _fitted(forms[-1], layers, replace(asked, bits=dense, rank=asked.rank or 0), 0)
        fewest = f"at least {math.ceil(100 * least.bits) / 100:g}" if least else "more"
        raise InputError(f"{asked.bits:g} bits a weight are too few for these layers. Ask for {fewest}.")
    return found


def alternatives(layers: Mapping[str, Layer], asked: Asked, chosen: Choice) -> list[Choice]:
    """Return what else the same bits would buy: the next grid, pruned values of the model's type and on a grid."""
    free = replace(asked, pattern=None, values=None)
    grid = chosen.form.grid
    below = [values for values in VALUES if grid and values < grid.name] or ["int8"]
    wanted = [replace(free, pattern=WHOLE, values=below[0]), replace(free, values=MODEL)]
    wanted += [replace(free, pattern=NM(16, SPARSE))]
    found: list[Choice] = []
    for other in wanted:
        try:
            choice = pick(layers, other)
        except InputError:
            continue
        if (choice.form.pattern, choice.form.grid) not in [(c.form.pattern, c.form.grid) for c in (chosen, *found)]:
            found.append(choice)
    return found


def _candidates(asked: Asked) -> Iterator[Form]:
    """Yield forms, the best first: each is worth more than those after it wherever it fits."""
    pattern = asked.pattern
    values = [asked.values] if asked.values else [*VALUES]
    if pattern is not None:
        yield from (asked.form(pattern, name) for name in values)
        return
    for name in values:
        if name != MODEL:
            yield asked.form(WHOLE, name)
        if name == PRUNED:
            yield from (asked.form(NM(kept, SPARSE), name) for kept in range(SPARSE - 1, LEAST_OF_PRUNED - 1, -1))
    yield from (asked.form(NM(kept, SPARSE), values[-1]) for kept in range(SPARSE - 1, 0, -1))


def _least_for_rank(form: Form, asked: Asked) -> float:
    """Bits that a form must leave for its low-rank part to be chosen."""
    if not asked.chooses_rank:
        return 0.0
    if form.grid is None:
        return SHARE_OF_RANK * (asked.bits - 1)
    if form.pattern.density < 1:
        return 0.0 if form.given else LEAST_BESIDE_ZEROS
    return 0.0 if asked.values else LEAST_FOR_RANK[form.grid.name]


def _finer(found: Choice, layers: Mapping[str, Layer], asked: Asked) -> Choice:
    """Halve the groups of a choice as long as that is worth more than the rank it costs, or costs none."""
    grid = found.form.grid
    if grid is None or asked.group is not None:
        return found
    for group in GROUPS[1:]:
        if asked.chooses_rank and _bits_of_rank(found, layers) <= MOST_FOR_RANK:
            break
        finer = _fitted(replace(found.form, grid=replace(grid, group=int(group))), layers, asked, 0)
        if finer is None:
            break
        found = finer
    return found


def _bits_of_rank(found: Choice, layers: Mapping[str, Layer]) -> float:
    sizes = (budget.low_rank_bytes(layers[n].shape, layers[n].size) for n, budget in found.budgets.items())
    return 8 * sum(sizes) / found.weights


def _fitted(form: Form, layers: Mapping[str, Layer], asked: Asked, least: float) -> Choice | None:
    """Return the form with ranks that take what is left; None unless it leaves ``least`` bits for them.

    Ranks are the same (beside values in the model's type: grow with the layer) as far as whole numbers, the sides of a
    layer and the bytes of its dense weight allow.
    """
    weights, biases = sum(_weights(layers)), sum(layer.bias for layer in layers.values())
    total = math.floor(asked.bits * weights / 8) - biases
    free = {name: layer for name, layer in layers.items() if layer.ruled is None}
    budgets = {}
    for name, layer in layers.items():
        budget = form.budget(layer.shape[1], (asked.rank or 0) if asked.low_rank else 0)
        if layer.ruled is not None:
            rank = _rank_of(layer, budget, asked.bits) if asked.chooses_rank else budget.rank
            budget = layer.ruled(replace(budget, rank=rank))
        budgets[name] = budget
    spent = sum(budget.bytes(layers[name].shape, layers[name].size) for name, budget in budgets.items())
    if spent + least * sum(_weights(free)) / 8 > total:
        return None
    if asked.chooses_rank and free:
        growth = RANK_BY_SIZE if form.grid is None else 0.0
        filled = {name: _Filled(layer, budgets[name], growth) for name, layer in free.items()}
        others = spent - sum(one.base for one in filled.values())
        for name, rank in _filled_up(filled, total - others).items():
            budgets[name] = replace(budgets[name], rank=rank)
    size = sum(budget.bytes(layers[name].shape, layers[name].size) for name, budget in budgets.items())
    return Choice(form, budgets, size + biases, weights)


def _rank_of(layer: Layer, budget: Budget, bits: float) -> int:
    """The largest rank with which a layer takes no more than so many bits a weight."""
    filled = _Filled(layer, budget)
    return min(max(math.floor((bits * layer.weights / 8 - filled.base) / filled.each), 0), filled.most(SHORTEST))


class _Filled:
    """The bytes of one layer as its rank grows.

    Args:
        layer: It.
        budget: Of any rank.
        growth: Power of out · in / (out + in) by which its rank is to grow.

    Attributes:
        base: Bytes without a low-rank part.
        each: Bytes of a rank of 1.
        share: Of its rank beside those of other layers.
    """

    def __init__(self, layer: Layer, budget: Budget, growth: float = 0.0) -> None:
        self.share = (max(layer.weights, 1) / max(sum(layer.shape), 1)) ** growth
        self.base = budget.sparse_bytes(layer.shape, layer.size)
        self.each = replace(budget, rank=1).low_rank_bytes(layer.shape, layer.size)
        self._side = min(layer.shape)
        self._spare = layer.weights * layer.size - self.base  # never more than dense

    def most(self, part: int) -> int:
        """The largest rank, if it may be this part of the shorter side."""
        return max(min(self._side // part, self._spare // self.each), 0)

    def bytes(self, rank: int) -> int:
        """Of the layer with this rank."""
        return self.base + rank * self.each


def _filled_up(layers: Mapping[str, _Filled], total: int) -> dict[str, int]:
    """Return ranks with which layers take at most ``total`` bytes, and nearly all of them."""
    most: dict[str, int] = {}
    for part in (SHORTEST, 1):
        most = {name: layer.most(part) for name, layer in layers.items()}
        if sum(layer.bytes(most[name]) for name, layer in layers.items()) >= total:
            break

    largest = max(layer.share for layer in layers.values())

    def ranks(common: int) -> dict[str, int]:
        return {name: min(round(common * layer.share / largest), most[name]) for name, layer in layers.items()}

    widest = math.ceil(max(most[name] * largest / layer.share for name, layer in layers.items()))
    common = max(bisect_right(range(1 + widest), total, key=lambda r: _bytes_at(layers, ranks(r))) - 1, 0)
    found = ranks(common)
    left = total - _bytes_at(layers, found)
    for name in sorted(layers, key=lambda name: layers[name].each):  # as many as possible
        if layers[name].each <= left and found[name] < most[name]:
            found[name] += 1
            left -= layers[name].each
    return found


def _bytes_at(layers: Mapping[str, _Filled], ranks: Mapping[str, int]) -> int:
    return sum(layer.bytes(ranks[name]) for name, layer in layers.items())


def _weights(layers: Mapping[str, Layer]) -> Sequence[int]:
    return [layer.weights for layer in layers.values()]
