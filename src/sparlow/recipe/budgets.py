"""Budgets: what each layer of a model may keep, before any allocation by data."""

from sparlow.algorithms import check_budget
from sparlow.errors import InputError
from sparlow.model.forward.decoder import Decoder
from sparlow.recipe.allocation import Budget, matches
from sparlow.recipe.recipe import Recipe


def budgets(decoder: Decoder, recipe: Recipe) -> dict[str, Budget]:
    """Return the budget of each layer by its full name, before any allocation by data. Dense layers have none.

    Raises:
        InputError: Names the first layer that does not fit the recipe, or says that there is nothing to compress.
    """
    named = [(name, weight.shape) for name, weight in decoder.layers()]
    if not named:
        raise InputError("There is nothing to compress: the model's decoder blocks have no plain linear layer.")
    for pattern in (*recipe.ignore, *(rule.match for rule in recipe.layers)):
        if not any(matches(pattern, name) for name, _ in named):
            raise InputError(f"No layer's name ends in {pattern!r}. The first layer is {named[0][0]}.")
    found = {}
    for name, shape in named:
        budget = recipe.budget(name, shape)
        if budget is None:
            continue
        try:
            check_budget(recipe.found_algorithm, shape, budget.pattern, budget.rank)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
        found[name] = budget
    if not found:
        raise InputError("There is nothing to compress: the recipe ignores every layer. Shorten --ignore.")
    return found
