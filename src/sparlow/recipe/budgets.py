"""Budgets: what each layer of a model may keep, before any allocation by data, and which layers stay dense."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from transformers import PreTrainedModel

from sparlow.algorithms import check_budget
from sparlow.errors import InputError
from sparlow.files import human_bytes
from sparlow.model.artefact.dtypes import StoredDtypes
from sparlow.model.forward.decoder import Decoder
from sparlow.model.forward.roles import kept_dense
from sparlow.recipe.allocation import Budget, Rule, Shape, matches, require_total
from sparlow.recipe.bits import Asked, Choice, Layer, alternatives, pick
from sparlow.recipe.recipe import DEFAULT_GROUPS, DEFAULT_RANK, Recipe
from sparlow.recipe.whole_file import AS_IT_IS, Ends, bits_within, ends_for

NO_PATTERN = f"linear layer of {{}} inputs, no multiple of {DEFAULT_GROUPS[-1]} as the default patterns need"
SMALLER = (4.5, 3.5)  # bits that a run without --bits ends by naming
NO_GAIN = "linear layer that would take more than dense"


@dataclass(frozen=True)
class Selection:
    """What a recipe means for the layers of a model.

    Attributes:
        budgets: What each layer may keep, by its full name; those that stay dense are not there.
        dense: Why a layer stays dense that the recipe does not ignore, by its full name.
        warnings: What a user should know of it, one sentence each.
        picked: What was chosen for a number of bits, and what else would have taken as many; empty if none was given.
        layers: What is compressed, as ``bits.pick`` looks at it.
        ends: How the embedding and the output head are stored.
    """

    budgets: dict[str, Budget]
    dense: dict[str, str]
    warnings: tuple[str, ...]
    picked: str = ""
    layers: Mapping[str, Layer] = field(default_factory=dict)
    ends: Ends = AS_IT_IS


@dataclass(frozen=True)
class _Layer:
    """One layer, and what it may keep; once that was fitted to it, None if it stays dense."""

    name: str
    shape: Shape
    size: int  # bytes of a number as stored
    budget: Budget | None
    why: str = ""
    bias: int = 0  # bytes of it

    @property
    def share(self) -> float:
        """Bytes as stored, of those of the dense weight."""
        dense = self.shape[0] * self.shape[1] * self.size
        return self.budget.bytes(self.shape, self.size) / dense if self.budget else 1.0


def select(
    model: PreTrainedModel,
    decoder: Decoder,
    recipe: Recipe,
    storage: StoredDtypes,
    roles: Mapping[str, str] | None = None,
) -> Selection:
    """Choose what each layer may keep before the data have a say.

    What the recipe says of a layer is obeyed. What follows from its defaults, or from a compression, is fitted to the
    layer: it never takes more than the dense weight, and never stops a model.

    Args:
        model: Its weights may be anywhere; they are not looked at.
        decoder: Its blocks.
        recipe: What is done.
        storage: The types that weights are stored in.
        roles: What ``kept_dense`` says of the model, where that is known: it takes a second to find out.

    Raises:
        InputError: Names the first layer that does not fit the recipe, or says that there is nothing to compress.
    """
    known = _known(model, decoder, recipe, storage, roles)
    layers = _as_layers(known, recipe)
    ends, picked = None, ""
    if layers and recipe.chooses:
        bits = recipe.bits or 0.0
        if recipe.size is not None:
            bits, ends = bits_within(recipe.size, layers, model, recipe, storage)
        choice = pick(layers, recipe.asked(bits))
        known = [replace(layer, budget=choice.budgets.get(layer.name, layer.budget)) for layer in known]
        picked = _said(choice, layers, recipe, ends)
    found = [replace(layer, budget=None) if layer.why else _fitted(layer, recipe) for layer in known]
    budgets = {layer.name: layer.budget for layer in found if layer.budget}
    if not budgets:
        first = f"{found[0].name} as a {found[0].why}"
        raise InputError(f"There is nothing to compress: every layer stays dense, {first}. Give another model.")
    if recipe.compression is not None:
        free = {layer.name: layer.shape for layer in found if layer.budget and not recipe.has_rule(layer.name)}
        kept = [budgets[name].values(shape) for name, shape in free.items()]
        require_total(kept, (1 - recipe.compression) * sum(map(math.prod, free.values())), exactly=False)
    dense = {layer.name: layer.why for layer in found if not layer.budget}
    ends = ends or ends_for(model, recipe, storage, _bits(found))
    return Selection(budgets, dense, tuple(_warnings(found, recipe)), picked, layers, ends)


def _known(
    model: PreTrainedModel, decoder: Decoder, recipe: Recipe, storage: StoredDtypes, roles: Mapping[str, str] | None
) -> list[_Layer]:
    """Return the layers that the recipe does not ignore, with what it says of each; InputError if there is none."""
    named = dict(decoder.layers())
    if not named and getattr(model.config, "quantization_config", None) is not None:
        raise InputError("There is nothing to compress: the model's weights are packed already. Give the dense model.")
    if not named:
        raise InputError("There is nothing to compress: the model's decoder blocks have no plain linear layer.")
    _require_effect(recipe, [*named])
    roles = kept_dense(model, decoder) if roles is None else roles
    known = []
    for name, weight in named.items():
        budget = recipe.budget(name, weight.shape)
        if budget is not None:
            why = "" if recipe.has_rule(name) else roles.get(name, "")
            bias = 0 if weight.bias is None else weight.bias.numel() * storage.of_tensor(f"{name}.bias").itemsize
            known.append(_Layer(name, weight.shape, storage.of_layer(name).itemsize, budget, why, bias))
    return known


def _require_effect(recipe: Recipe, names: Sequence[str]) -> None:
    """Raise InputError for what a recipe says of layers by their names and what changes nothing.

    Args:
        recipe: What is done.
        names: Of all layers in full.
    """
    for pattern in (*recipe.ignore, *(rule.match for rule in recipe.layers)):
        if not any(matches(pattern, name) for name in names):
            raise InputError(f"No layer's name ends in {pattern!r}. The first layer is {names[0]}.")
    kept = [name for name in names if not any(matches(pattern, name) for pattern in recipe.ignore)]
    if not kept:
        raise InputError("There is nothing to compress: the recipe ignores every layer. Shorten --ignore.")
    for i, rule in enumerate(recipe.layers):
        own = [name for name in kept if matches(rule.match, name)]
        if not own:
            raise InputError(
                f"The rule for {rule.match!r} has no effect: every layer it names is ignored. "
                "Remove the rule, or shorten --ignore."
            )
        if all(_overruled(rule, name, recipe.layers[i + 1 :]) for name in own):
            raise InputError(
                f"The rule for {rule.match!r} has no effect: later rules decide of every layer it names. "
                "Remove it, or put it behind them."
            )


def _overruled(rule: Rule, name: str, later: Sequence[Rule]) -> bool:
    """Whether rules behind this one decide all that it says of the layer of this name."""
    found = [other for other in later if matches(other.match, name)]
    given = [key for key in rule.to_dict() if key != "match"]
    return bool(found) and all(any(getattr(other, key) is not None for other in found) for key in given)


def _bits(found: Sequence[_Layer]) -> float:
    """Bits of a compressed weight."""
    sizes = [(math.prod(layer.shape), layer.budget.bytes(layer.shape, layer.size)) for layer in found if layer.budget]
    return 8 * sum(size for _, size in sizes) / sum(weights for weights, _ in sizes)


def _said(choice: Choice, layers: Mapping[str, Layer], recipe: Recipe, ends: Ends | None) -> str:
    """Say in one line what was chosen, and what else would have taken as many bits."""
    given = f"--bits {recipe.bits:g}" if recipe.size is None else f"--size {recipe.size}"
    others = "; ".join(map(str, alternatives(layers, recipe.asked(choice.bits), choice)))
    beside = f", {ends}" if ends else ""
    return f"{given} picked {choice}{beside}." + (f" Others would have been: {others}." if others else "")


def _as_layers(layers: Sequence[_Layer], recipe: Recipe) -> dict[str, Layer]:
    """Return what is compressed, as a choice looks at it."""

    def ruled(layer: _Layer) -> Callable[[Budget], Budget] | None:
        if not recipe.has_rule(layer.name):
            return None
        return lambda budget: recipe.budget(layer.name, layer.shape, budget) or budget

    return {layer.name: Layer(layer.shape, layer.size, ruled(layer), layer.bias) for layer in layers if not layer.why}


def _fitted(layer: _Layer, recipe: Recipe) -> _Layer:
    """Cut what was not asked for down to what the layer can use; InputError if what was asked for is not possible."""
    shape, budget = layer.shape, layer.budget
    if budget is None:
        return layer
    if recipe.takes_default_pattern(layer.name) and shape[1] % DEFAULT_GROUPS[-1]:
        return replace(layer, budget=None, why=NO_PATTERN.format(shape[1]))
    if not recipe.gives_rank(layer.name):
        most = min(budget.rank, *shape, _largest_rank(budget, shape, layer.size))
        budget = replace(budget, rank=max(most, 0))
        if most < 0 and recipe.compression is not None and not recipe.has_rule(layer.name):
            return replace(layer, budget=None, why=NO_GAIN)
    try:
        check_budget(recipe.found_algorithm, shape, budget.pattern, budget.rank)
    except InputError as error:
        raise InputError(f"{layer.name}: {error}") from None
    return replace(layer, budget=budget)


def _largest_rank(budget: Budget, shape: Shape, size: int) -> int:
    """The largest rank with which a layer takes no more than dense; negative if its sparse part alone takes more."""
    left = shape[0] * shape[1] * size - budget.sparse_bytes(shape, size)
    return left // replace(budget, rank=1).low_rank_bytes(shape, size)


def _warnings(found: Sequence[_Layer], recipe: Recipe) -> Iterator[str]:
    kept = {layer.name: layer.budget for layer in found if layer.budget}
    usual = f"{DEFAULT_GROUPS[0] // 2}:{DEFAULT_GROUPS[0]}"
    patterns = Counter(str(b.pattern) for name, b in kept.items() if recipe.takes_default_pattern(name))
    others = [f"{count} take {pattern}" for pattern, count in patterns.items() if pattern != usual]
    if others:
        yield f"Of {len(kept)} layers {' and '.join(others)}, because {DEFAULT_GROUPS[0]} does not divide their inputs."
    if recipe.compression is None and not recipe.chooses and recipe.found_algorithm.kind != "pruner":
        ranks = [b.rank for name, b in kept.items() if not recipe.gives_rank(name) and b.rank < DEFAULT_RANK]
        if ranks:
            yield (
                f"{len(ranks)} of {len(kept)} layers have a rank from {min(ranks)} to {max(ranks)} and not the default "
                f"of {DEFAULT_RANK}, which is too large for them."
            )
    grown = sorted((layer for layer in found if layer.share > 1), key=lambda layer: -layer.share)
    if grown:
        yield (
            f"{len(grown)} of {len(kept)} layers take more than dense, the most {grown[0].name} with "
            f"{grown[0].share:.0%}. Give them a lower rank or a sparser pattern, or leave them out with --ignore."
        )


def would_take(layers: Mapping[str, Layer], recipe: Recipe, outside: int) -> list[str]:
    """Say in one line how large the model would be at fewer bits.

    Args:
        layers: That are compressed.
        recipe: Says whether the method has a low-rank part.
        outside: Bytes of all that is not compressed.
    """
    free = {name: replace(layer, ruled=None) for name, layer in layers.items()}
    low_rank = recipe.found_algorithm.kind != "pruner"
    parts = []
    for bits in SMALLER:
        try:
            size = pick(free, Asked(bits, low_rank=low_rank)).bytes + outside
        except InputError:  # layers too small for it, or a model that takes as few bits already
            continue
        parts.append(f"--bits {bits} would take {human_bytes(size)}")
    return [f"The whole model in fewer bits: sparlow compress … {', '.join(parts)}."] if parts else []
