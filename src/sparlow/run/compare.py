"""Many methods on one model: the same text, one dense evaluation, a directory a method, one table, two figures."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from sparlow.algorithms import find
from sparlow.errors import InputError, RunError
from sparlow.linalg.patterns import NM
from sparlow.planning.feasibility import require_resources
from sparlow.progress import Notify, labelled
from sparlow.recipe.budgets import budgets
from sparlow.recipe.recipe import Recipe
from sparlow.recipe.run_options import listed
from sparlow.report.comparison import Comparison, Row
from sparlow.report.figures import draw, require_matplotlib
from sparlow.run.compress import foreseen, known_ahead, open_dense, windows_to_calibrate, windows_to_evaluate
from sparlow.run.job import Job
from sparlow.run.output_dir import check_folder, claimed
from sparlow.text import in_domain

MATCHED = "+match"  # what a method's name ends in where it stands beside itself without matching
TEXT = ("calibration", "samples", "seqlen", "seed", "bos", "column")  # what the methods of one comparison must share


def recipes_for(
    base: Recipe, names: Sequence[str], options: Mapping[str, Mapping[str, object]], match: str | None = None
) -> dict[str, Recipe]:
    """The recipe of each method: ``base`` with its name and options, without a low-rank part if it only prunes.

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
        raise InputError(f"--match {match} is not understood: give no, yes or both.")
    if len(set(names)) < len(names) or not names:
        raise InputError(f"Name the algorithms to compare, each once, not: {', '.join(names) or 'none'}.")
    unused = [name for name in options if name not in names]
    if unused:
        raise InputError(f"An option is given for {unused[0]}, which is not compared: {', '.join(names)} are.")
    found = {}
    for name in names:
        changes: dict[str, Any] = {"algorithm": name, "options": options.get(name, {})}
        if find(name)[0].kind == "pruner":
            changes |= {"rank": None, "rank_share": None, "compression": None if base.pattern else base.compression}
            if base.allocate == "error" and isinstance(base.pattern_of_all, NM):
                changes["allocate"] = "uniform"  # without ranks there is nothing to move
        for matching in matched[match]:
            found[f"{name}{MATCHED if match == 'both' and matching else ''}"] = replace(base, match=matching, **changes)
    return found


def compare(
    model: str | Path,
    recipes: Mapping[str, Recipe],
    *,
    out: str | Path,
    evaluate: Sequence[str] = ("builtin",),
    evaluate_seqlen: int | None = None,
    limit: int | None = None,
    device: str = "auto",
    offload: str = "auto",
    overwrite: bool = False,
    force: bool = False,
    trust_remote_code: bool = False,
    notify: Notify = lambda _: None,
) -> Comparison:
    """Compress one model by every recipe, each into ``out``/name; what is finished there is not done again.

    Args:
        model: Hub id, directory or .gguf file.
        recipes: By the name of the method; all with the same calibration text.
        out: Directory for the results, ``compare.json`` (rewritten after every method) and the figures.
        evaluate: Corpora or files for perplexity; the dense model is measured once.
        evaluate_seqlen: Tokens in a window of these; the recipes' seqlen if left out.
        limit: At most so many windows of each.
        device: "auto", or torch's name of a device.
        offload: As of ``sparlow.compress``.
        overwrite: Do everything again.
        force: As of ``sparlow.compress``.
        trust_remote_code: Let the model bring Python code of its own.
        notify: Called after every step; stages begin with the method's name.

    Returns:
        What ``compare.json`` holds; a method whose run failed is in ``failed``, and did not stop the others.

    Raises:
        InputError: Something given cannot be used, or ``out`` holds other results.
    """
    require_matplotlib()
    evaluate = listed(evaluate)
    out, first = Path(out), next(iter(recipes.values()))
    seqlen = evaluate_seqlen or first.seqlen
    _check(recipes, out, overwrite=overwrite)
    if not force:
        how: dict[str, Any] = {"evaluate": evaluate, "evaluate_seqlen": evaluate_seqlen, "limit": limit}
        how |= {"device": device, "offload": offload, "trust_remote_code": trust_remote_code, "streamed": True}
        shape = known_ahead(model, first.dtype, trust_remote_code=trust_remote_code) or model  # one for all recipes
        works = {out / name: foreseen(shape, recipe, **how) for name, recipe in recipes.items()}
        require_resources({folder: work for folder, work in works.items() if work})
    opening = functools.partial(
        open_dense, model, None, device=device, trust_remote_code=trust_remote_code, streamed=True
    )
    opened, storage = opening(first)
    for recipe in recipes.values():
        budgets(opened.decoder, recipe)
    windows, texts = (
        windows_to_calibrate(None, opened, first),
        windows_to_evaluate(evaluate, opened, seqlen, limit, first.column),
    )
    found = Comparison(opened.name, first.to_dict(), _evaluation(first, seqlen, texts))
    known: dict[str, float] = {}
    spoilt = False
    for name, recipe in recipes.items():
        if spoilt:
            opened, storage = opening(recipe)
        job = Job(opened, storage, recipe, windows, labelled(notify, before=f"{name}: "), offload=offload)
        with claimed(out / name, overwrite=overwrite, finished=True):
            job.write_to(out / name, overwrite=overwrite)
            job.known_dense |= known
            _run(name, job, texts, found)
        known |= job.known_dense
        found.write(out)
        spoilt = not opened.on_disk
        del job
        if spoilt:  # compressed in place; freed before the next is opened
            del opened
    draw(found, out)
    return found


def _check(recipes: Mapping[str, Recipe], out: Path, *, overwrite: bool) -> None:
    """See before anything is opened that the recipes go together and every directory can be written."""
    first = next(iter(recipes.values()))
    if any(getattr(recipe, name) != getattr(first, name) for recipe in recipes.values() for name in TEXT):
        raise InputError(f"The recipes of a comparison must agree in {', '.join(TEXT)}.")
    for name in recipes:
        check_folder(out / name, overwrite=overwrite, finished=True)


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
    except RunError as error:
        found.failed[name] = str(error)
    else:
        found.rows.append(Row.of(name, report))
        found.dense = {"perplexity": report.dense["perplexity"], "bytes": report.bytes["dense"]}
