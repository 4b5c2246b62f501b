"""What fits into a size: the forms a model can take, the bytes of the whole file, and what was measured of each.

The quality is that of another model, which is named with it: a measurement to go by, no promise. Figures are in
``measured.toml``, and nowhere else.
"""

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from sparlow.errors import InputError
from sparlow.exporting.integers import Need
from sparlow.linalg.grid import Grid, make_grid
from sparlow.model.artefact.dtypes import StoredDtypes
from sparlow.model.forward.compressible import expert_of
from sparlow.planning.workload import Structure
from sparlow.recipe.budgets import select
from sparlow.recipe.recipe import Recipe
from sparlow.recipe.sizes import parse_size

_OURS = "sparlow"
_UNASKED: dict[str, Any] = {  # fields of a recipe that say what to keep, which a form says anew
    **dict.fromkeys(("bits", "size", "compression", "rank_share", "pattern", "rank", "values", "group")),
    "levels": "auto",
    "layers": (),
    "allocate": "uniform",
}
_ANY = "any program at full size (merged)"
_PLUGIN = "vLLM with sparlow installed"  # by sparlow.serving, which takes every form of values, but no experts


@dataclass(frozen=True)
class Choice:
    """A form that a model can take.

    Attributes:
        name: What is kept, in words.
        recipe: The options of ``compress`` for it.
        bytes: Of the whole file, without headers.
        bits: A compressed weight, U V and scales included.
        fits: Whether it keeps to the size or the bits that were asked for; None where nothing was.
        perplexity: What was measured, as a multiple of the dense model's; None if nothing was.
        speed: In words.
        opened_by: The programs that open it, or what ``sparlow export`` makes of it.
        over: By which share of what was asked for it takes more; 0 where it fits, or nothing was asked for.
    """

    name: str
    recipe: dict[str, Any]
    bytes: int
    bits: float
    fits: bool | None
    perplexity: float | None
    speed: str
    opened_by: tuple[str, ...]
    over: float = 0.0


@cache
def measured() -> dict[str, Any]:
    """Return what was measured, and with which model, text and command."""
    return tomllib.loads(files(__package__ or "sparlow.planning").joinpath("measured.toml").read_text("utf-8"))


@dataclass(frozen=True)
class LeftOut:
    """Forms that a model cannot take.

    Attributes:
        names: Theirs.
        why: The sentence that ``compress`` would stop with.
    """

    names: tuple[str, ...]
    why: str


def choices(structure: Structure, recipe: Recipe) -> tuple[tuple[Choice, ...], tuple[LeftOut, ...]]:
    """Return the forms in the order of their bytes, and those that are left out, by reason.

    Args:
        structure: Of the model.
        recipe: Says what is left dense, and the bits or the size that is asked for.
    """
    model, decoder = structure.model, structure.decoder
    storage = StoredDtypes.of(model)
    found, left = [], dict[str, list[str]]()
    for row in measured()["form"]:
        try:
            one = recipe.changed(**{**_UNASKED, **row["recipe"]})
            selection = select(model, decoder, one, storage, structure.roles)
        except InputError as problem:  # the method has no low-rank part, say, or a pattern does not divide the columns
            left.setdefault(str(problem), []).append(row["name"])
            continue
        layers = {name: weight for name, weight in decoder.layers() if name in selection.budgets}
        sizes = {name: (weight.shape, storage.of_layer(name).itemsize) for name, weight in layers.items()}
        weights = sum(rows * columns for (rows, columns), _ in sizes.values())
        dense = sum(storage.bytes_of_weight(weight, name) for name, weight in layers.items())  # with biases
        biases = dense - sum(rows * columns * size for (rows, columns), size in sizes.values())
        kept = biases + sum(budget.bytes(*sizes[name]) for name, budget in selection.budgets.items())
        total = storage.bytes_of(model) - dense + kept - selection.ends.saved
        bits = 8 * kept / weights
        ratio = row["perplexity"] / measured()["dense"] if row["perplexity"] else None
        over = _over(recipe, total, bits, storage.bytes_of(model))
        fits, more = (None, 0.0) if over is None else (over <= 0, max(over, 0.0))
        grid = make_grid(one.values or "model", one.levels, one.group or "128")
        opened = opened_by(grid, served=not any(expert_of(model, name) for name in layers))
        found.append(Choice(row["name"], dict(row["recipe"]), total, bits, fits, ratio, row["speed"], opened, more))
    out = tuple(LeftOut(tuple(names), why) for why, names in left.items())
    return tuple(sorted(found, key=lambda choice: choice.bytes)), out


def _over(recipe: Recipe, total: int, bits: float, dense: int) -> float | None:
    """By which share of what was asked for a form takes more; None where nothing was."""
    if recipe.size is not None:
        return total / parse_size(recipe.size, dense) - 1
    return None if recipe.bits is None else bits / recipe.bits - 1


def opened_by(grid: Grid | None, *, served: bool = True) -> tuple[str, ...]:
    """Return the programs that open values on a grid in about the same bytes.

    Args:
        grid: None stands for 16 bits.
        served: Whether sparlow.serving takes the model.
    """
    need = Need.of(grid).bits
    found = [_OURS]
    if served:
        found.append(_PLUGIN)
    if grid and need and need <= max(grid.bits, 4):
        found.append("vLLM alone, SGLang, transformers (compressed-tensors)")
    if grid and need:
        found.append("llama.cpp, Ollama (gguf)")
    return (*found, _ANY)
