"""What a recipe may not say: options that contradict each other, and options that would have no effect."""

from typing import TYPE_CHECKING

from sparlow.errors import InputError
from sparlow.recipe.sizes import parse_size
from sparlow.report.value_types import MODEL

if TYPE_CHECKING:
    from sparlow.recipe.recipe import Recipe


def require_budget(recipe: "Recipe") -> None:
    """Check that pattern and rank, or what they follow from, are given without contradiction.

    Raises:
        InputError: They are not.
    """
    prunes = recipe.found_algorithm.kind == "pruner"
    if recipe.chooses:
        _require_choice(recipe)
    if recipe.rank_share is not None and (prunes or recipe.compression is None):
        why = f"{recipe.algorithm} has no low-rank part" if prunes else "it is a share of what --compression leaves"
        raise InputError(f"--rank-share cannot be used here: {why}.")
    if recipe.compression is not None and recipe.rank is not None:
        raise InputError("Give --pattern and --rank, or --compression. A rank follows from the compression.")
    if recipe.compression is not None and (recipe.pattern is None) == (recipe.rank_share is None) and not prunes:
        raise InputError("Beside --compression give either --rank-share or --pattern. The rest follows.")
    if recipe.compression is not None and recipe.pattern is not None and prunes:
        raise InputError(f"{recipe.algorithm} only prunes. Give --pattern or --compression, not both.")
    _require_allocation(recipe)


def _require_choice(recipe: "Recipe") -> None:
    """Check that a number of bits or bytes leaves something to choose, and is the only such number."""
    own = "--bits" if recipe.size is None else "--size"
    if recipe.size is not None:
        parse_size(recipe.size, 0)
    for name in ("bits", "compression", "rank_share") if recipe.size is not None else ("compression", "rank_share"):
        if getattr(recipe, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise InputError(f"{own} decides how much is kept, and so does {option}. Give one of them.")
    low_rank = recipe.rank is None and recipe.found_algorithm.kind != "pruner"
    if recipe.pattern is not None and recipe.values is not None and not low_rank:
        raise InputError(f"Pattern, values and rank are given, so {own} has nothing to choose. Leave one out.")


def _require_allocation(recipe: "Recipe") -> None:
    from sparlow.linalg.patterns import NM

    uniform = recipe.uniform((1, 1))
    if recipe.allocate == "owl" and (isinstance(uniform.pattern, NM) or uniform.pattern.density == 1):
        raise InputError("OWL gives every block a density of its own. Give an unstructured --pattern such as 0.5.")
    if isinstance(uniform.pattern, NM) and recipe.allocate == "error" and not (uniform.rank or recipe.compression):
        raise InputError(
            f"With {uniform.pattern} an allocation by error moves ranks, and there is no low-rank part here. "
            "Give a --rank, or an unstructured --pattern such as 0.5."
        )


def require_values(recipe: "Recipe") -> None:
    """Check that what is said of values and factors has an effect.

    Raises:
        InputError: It has none, or no grid is like that.
    """
    said = (recipe.values, *(rule.values for rule in recipe.layers))
    grids = [values for values in said if values not in (None, MODEL)]
    if recipe.chooses and recipe.values is None:
        grids.append("int8")
    for option, given in (("levels", recipe.levels != "auto"), ("group", recipe.group is not None)):
        if given and not grids:
            raise InputError(
                f"The option --{option} has no effect without --values int4 or the like. Add it, or leave it out."
            )
    for values in grids:
        recipe.grid_of(values)  # raises for one that is wrong
    ranks = [recipe.uniform((1, 1)).rank or recipe.compression, *(rule.rank for rule in recipe.layers)]
    if recipe.factors != "auto" and (recipe.found_algorithm.kind == "pruner" or not any(ranks)):
        raise InputError("--factors has no effect without a low-rank part. Give a --rank, or leave --factors out.")
