"""Compare methods on one model and text: one dense evaluation, a directory for each method, a table, two figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sparlow.algorithms import find
from sparlow.distributed import require_one
from sparlow.errors import InputError, RunError, is_out_of_memory, out_of_memory
from sparlow.linalg.patterns import NM
from sparlow.machine import free_memory
from sparlow.model.artefact.dtypes import StoredDtypes
from sparlow.model.loading.source import OpenedModel
from sparlow.own_settings import own_settings
from sparlow.planning.feasibility import require_feasible
from sparlow.progress import Notify, labelled
from sparlow.recipe.budgets import select
from sparlow.recipe.recipe import Recipe
from sparlow.recipe.run_options import DEFAULT, RunOptions
from sparlow.report.comparison import Comparison, Row
from sparlow.report.figures import draw, require_matplotlib
from sparlow.run.compress import open_dense, windows_to_calibrate, windows_to_evaluate
from sparlow.run.job import Job
from sparlow.run.output_dir import check_folder, claimed
from sparlow.text import in_domain

if TYPE_CHECKING:
    from sparlow.evaluation.agreement import Predictions

MATCHED = "+match"  # the suffix of a method with matching, if it is compared without matching too
TEXT = ("calibration", "samples", "seqlen", "seed", "bos", "column")  # what the methods of one comparison must share


def recipes_for(
    base: Recipe, names: Sequence[str], options: Mapping[str, Mapping[str, object]], match: str | None = None
) -> dict[str, Recipe]:
    """Return the recipe of each method: ``base`` with its name and options, without a low-rank part if it only prunes.

    Args:
        base: What they share.
        names: Of the methods.
        options: Of each method, by its name.
        match: "no", "yes", or "both": every method without, and once more with matching under the name NAME+match;
            None for what ``base`` says.

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
    found = {}
    for name in names:
        changes: dict[str, Any] = {"algorithm": name, "options": options.get(name, {})}
        if find(name)[0].kind == "pruner":
            changes |= {
                "rank": None,
                "rank_share": None,
                "factors": "auto",
                "compression": None if base.pattern else base.compression,
            }
            if base.allocate == "error" and isinstance(base.pattern_of_all, NM):
                changes["allocate"] = "uniform"  # without ranks there is nothing to move
        for matching in matched[match]:
            found[f"{name}{MATCHED if match == 'both' and matching else ''}"] = base.changed(match=matching, **changes)
    return found


@own_settings()
def compare(
    model: str | Path,
    recipes: Mapping[str, Recipe],
    *,
    out: str | Path,
    options: RunOptions = DEFAULT,
    overwrite: bool = False,
    force: bool = False,
    notify: Notify = lambda _: None,
) -> Comparison:
    """Compress one model by every recipe, each into ``out``/name; finished methods are reused.

    Args:
        model: Hub id, directory or .gguf file.
        recipes: By the name of the method; all with the same calibration text.
        out: Directory for the results, ``compare.json`` (rewritten after every method) and the figures.
        options: How each method runs; the dense model is measured once.
        overwrite: Do everything again.
        force: As of ``sparlow.compress``.
        notify: Called after every step; stages begin with the method's name.

    Returns:
        What ``compare.json`` holds; a method whose run failed is in ``failed``, and did not stop the others.

    Raises:
        InputError: Something given cannot be used, or ``out`` holds other results.
    """
    require_one("A comparison")
    require_matplotlib()
    out, first = Path(out), next(iter(recipes.values()))
    _check(recipes, out, overwrite=overwrite)
    earlier = None if overwrite else Comparison.found_in(out)
    if not force:
        require_feasible(model, {out / name: recipe for name, recipe in recipes.items()}, options)
    opened, storage = _opened_for(model, recipes, options)
    windows = windows_to_calibrate(None, opened, first)
    seqlen = options.evaluate_seqlen or first.seqlen
    texts = windows_to_evaluate(options.evaluate, opened, seqlen, options.limit, first.column)
    found = Comparison(opened.name, first.to_dict(), _evaluation(first, seqlen, texts), _settings(recipes))
    found.take_over(earlier, out)
    known: dict[str, Any] = {}  # perplexities of the dense model
    predictions: dict[str, Predictions] = {}  # of the dense model, too
    spoilt = False
    for name, recipe in recipes.items():
        if spoilt:
            opened, storage = open_dense(model, None, recipe, options)
        job = Job(opened, storage, recipe, windows, labelled(notify, before=f"{name}: "), offload=options.offload)
        with claimed(out / name, overwrite=overwrite, finished=True):
            job.write_to(out / name, overwrite=overwrite)
            job.known_dense |= known
            job.runner.predictions |= predictions
            _run(name, job, texts, found)
        known |= job.known_dense
        predictions |= job.runner.predictions
        found.write(out)
        spoilt = opened.changes
        del job
        free_memory()  # of what failed, too
        if spoilt:  # compressed in place; freed before the next is opened
            del opened
    draw(found, out)
    return found


def _opened_for(
    model: str | Path, recipes: Mapping[str, Recipe], options: RunOptions
) -> tuple[OpenedModel, StoredDtypes]:
    """Open the dense model, and see that every recipe fits it before the first is run."""
    opened, storage = open_dense(model, None, next(iter(recipes.values())), options)
    for recipe in recipes.values():
        select(opened.model, opened.decoder, recipe, storage)
    return opened, storage


def _check(recipes: Mapping[str, Recipe], out: Path, *, overwrite: bool) -> None:
    """Check, before anything is opened, that the recipes go together and every directory can be written."""
    first = next(iter(recipes.values()))
    if any(getattr(recipe, name) != getattr(first, name) for recipe in recipes.values() for name in TEXT):
        raise InputError(f"The recipes of a comparison read different text. Give all the same {', '.join(TEXT)}.")
    for name in recipes:
        check_folder(out / name, overwrite=overwrite, finished=True)


def _settings(recipes: Mapping[str, Recipe]) -> dict[str, dict[str, Any]]:
    """What must agree between methods that stand in one table, by their names: all that is not a method's own."""
    found = {}
    for name, recipe in recipes.items():
        own = {"algorithm", "options"}
        if recipe.found_algorithm.kind == "pruner":
            own |= {"rank", "rank_share", "compression", "allocate", "factors"}
        if name.endswith(MATCHED):
            own |= {key for key in recipe.to_dict() if key.startswith("match")}
        found[name] = {key: value for key, value in recipe.to_dict().items() if key not in own}
    return found


def _evaluation(recipe: Recipe, seqlen: int, texts: Mapping[str, Tensor]) -> dict[str, Any]:
    """What ``compare.json`` says of the texts that perplexity is measured on."""
    return {
        "seqlen": seqlen,
        "windows": {name: len(windows) for name, windows in texts.items()},
        "in_domain": in_domain(recipe.calibration, texts),
    }


def _run(name: str, job: Job, texts: Mapping[str, Tensor], found: Comparison) -> None:
    try:
        report = job.go(texts)
    except Exception as error:
        no_memory = is_out_of_memory(error)
        if not (no_memory or isinstance(error, RunError)):
            raise
        found.failed[name] = out_of_memory(error) if no_memory else str(error)
    else:
        found.rows.append(Row.of(name, report))
        found.dense = {"perplexity": report.dense["perplexity"], "bytes": report.bytes["dense"]}
