"""The runs of a comparison: which recipe each method has, with what is varied, and where its result goes."""

import re
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from sparlow.algorithms import find, usual, variants
from sparlow.errors import InputError
from sparlow.linalg.patterns import NM
from sparlow.recipe.recipe import Recipe
from sparlow.report.comparison import MATCHED
from sparlow.schema import options_of, unknown

OF_TEXT = ("calibration", "samples", "seqlen", "bos", "column")  # what the runs of one comparison must share
NOT_VARIED = (*OF_TEXT, "algorithm", "options", "match", "ignore", "layers", "dtype")
NO_LOW_RANK = ("rank", "rank_share", "factors")  # fields that mean nothing to a method that only prunes


def names_of(asked: Sequence[str]) -> list[str]:
    """Return the methods to compare: those named, and in the place of ``usual`` or ``all`` those that it stands for."""
    sets = {"all": variants, "usual": usual}
    return [name for word in asked for name in (sets[word]() if word in sets else (word,))]


def recipes_for(
    base: Recipe,
    names: Sequence[str],
    options: Mapping[str, Mapping[str, object]],
    match: str | None = None,
    sweep: Mapping[str, Sequence[object]] | None = None,
) -> dict[str, Recipe]:
    """Return the recipe of each run: ``base`` with its name and options, without a low-rank part if it only prunes.

    Args:
        base: What they share.
        names: Of the methods.
        options: Of each method, by its name.
        match: "no", "yes", or "both": every method without, and once more with matching under the name NAME+match;
            None for what ``base`` says.
        sweep: Fields of the recipe with several values each. Every method is run with each combination, under its name
            followed by ``field=value``; one that only prunes is run once whatever the rank.

    Raises:
        InputError: A name is unknown or given twice, an option is not its own, or options name a method not compared.
    """
    matched = {None: (base.match,), "no": (False,), "yes": (True,), "both": (False, True)}
    if match not in matched:
        raise InputError(f"--match {match} is not understood. Give no, yes or both.")
    if len(set(names)) < len(names) or not names:
        raise InputError(
            f"Algorithms are missing or named twice: {', '.join(names) or 'none'}. Name each one to compare once."
        )
    unused = [name for name in options if name not in names]
    if unused:
        raise InputError(
            f"An option is given for {unused[0]}, which is not compared. Give options of: {', '.join(names)}."
        )
    found: dict[str, Recipe] = {}
    for name in names:
        for matching in matched[match]:
            head = f"{name}{MATCHED if match == 'both' and matching else ''}"
            for varied in _combinations(name, sweep or {}):
                changes = {"match": matching, "algorithm": name, "options": options.get(name, {})}
                whole = " ".join([head, *(f"{field}={value}" for field, value in varied.items())])
                found[whole] = _recipe(base, changes | varied)
    folders = {folder_of(name) for name in found}
    if len(folders) < len(found):
        raise InputError("Two of the runs to compare would have directories of one name. Vary other values.")
    return found


def _combinations(name: str, sweep: Mapping[str, Sequence[object]]) -> list[dict[str, Any]]:
    """Every combination of what is varied, of a method that only prunes without what it does not have."""
    pruner = find(name)[0].kind == "pruner"
    fields = {field: values for field, values in sweep.items() if not (pruner and field in NO_LOW_RANK)}
    return [dict(zip(fields, values, strict=True)) for values in product(*fields.values())]


def _recipe(base: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """A recipe for one run, without what its method does not have."""
    changes = dict(changes)
    if find(changes["algorithm"])[0].kind == "pruner":
        pattern = changes.get("pattern", base.pattern)
        changes |= {
            "rank": None,
            "rank_share": None,
            "factors": "auto",
            "compression": None if pattern else changes.get("compression", base.compression),
        }
        if base.allocate == "error" and isinstance(base.changed(**changes, allocate="uniform").pattern_of_all, NM):
            changes["allocate"] = "uniform"  # without ranks there is nothing to move
    return base.changed(**changes)


def parse_sweep(given: Sequence[str], seeds: Sequence[str] = ()) -> dict[str, list[object]]:
    """Read ``FIELD=VALUE,VALUE`` each, and seeds; return the values by the recipe's field.

    Raises:
        InputError: A field is unknown, not to be varied, or given twice; a value is wrong, or given twice.
    """
    fields = {name: option for name, option in options_of(Recipe).items() if name not in NOT_VARIED}
    pairs = [text.partition("=") for text in given] + ([("seed", "=", ",".join(seeds))] if seeds else [])
    found: dict[str, list[object]] = {}
    for name, equals, values in pairs:
        field = name.strip().replace("-", "_")
        if not equals:
            raise InputError(f"--sweep {name} is not understood. Write FIELD=VALUE,VALUE, such as pattern=2:4,16:32.")
        if field not in fields:
            raise InputError(unknown(f"--sweep cannot vary {name!r}", field, fields))
        words = [word.strip() for word in values.split(",") if word.strip()]
        parsed = [fields[field].parse(word) for word in words]
        if field in found or not words or len(set(map(str, parsed))) < len(parsed):
            raise InputError(f"--sweep {name} has no value, or one twice. Name each field and each value once.")
        found[field] = parsed
    return found


def folder_of(name: str) -> str:
    """The directory of a run, by its name: without blanks, colons and what else file systems do not take.

    >>> folder_of("3basil+match pattern=16:32")
    '3basil+match_pattern=16-32'
    """
    return re.sub(r"[^\w.+=-]", "-", name.replace(" ", "_"))
