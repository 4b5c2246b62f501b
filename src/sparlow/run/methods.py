"""``sparlow.compare``: several methods on one model and text, from what is easy to write down in Python."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparlow.errors import InputError
from sparlow.evaluation.tasks import load_tasks
from sparlow.progress import Notify
from sparlow.progress.live import watched
from sparlow.recipe.recipe import Recipe, RecipeLike, as_recipe
from sparlow.recipe.run_options import RunOptions, listed
from sparlow.report.comparison import Comparison
from sparlow.run.cases import names_of, recipes_for
from sparlow.run.compare import compare as run_comparison


def compare(
    model: str | Path,
    methods: str | Sequence[str] | Mapping[str, RecipeLike] = "usual",
    recipe: RecipeLike | None = None,
    *,
    out: str | Path,
    match: str | None = None,
    sweep: Mapping[str, Sequence[object]] | None = None,
    tasks: str | Sequence[str] = (),
    task_path: str | Path | None = None,
    reports_only: bool = False,
    evaluate: str | Sequence[str] = RunOptions.evaluate,
    evaluate_seqlen: int | None = RunOptions.evaluate_seqlen,
    limit: int | None = RunOptions.limit,
    device: str = RunOptions.device,
    offload: str = RunOptions.offload,
    overwrite: bool = False,
    force: bool = False,
    trust_remote_code: bool = RunOptions.trust_remote_code,
    notify: Notify | None = None,
    **fields: Any,  # noqa: ANN401 - fields of a recipe have many types
) -> Comparison:
    """Compress one model by several methods, each into ``out``/name; finished methods are reused.

    Args:
        model: Hub id, directory or .gguf file.
        methods: Names of algorithms, "usual" for the well-known quick ones, "all" for every one; or recipes of any kind
            by the name that each shall have.
        recipe: What algorithms share, as of ``compress``. Recipes that are given say all themselves.
        out: Directory for the results, the page ``compare.html``, tables and figures.
        match: Of algorithms: "no", "yes", or "both" for each without and with; if left out, as the recipe says.
        sweep: Of algorithms: values that fields of the recipe shall have in turn, ``{"rank": [0, 16]}`` or seeds.
        tasks: Of lm-eval, as ``evaluate`` takes them; every model answers them.
        task_path: Directory with task files (.yaml), which go before lm-eval's of the same name.
        reports_only: Keep no model, but its report and recipe in ``out``/reports.
        evaluate: Corpora or files on which perplexity is measured.
        evaluate_seqlen: Tokens in a window of these; the recipe's seqlen if left out.
        limit: At most so many windows of each of these; all if left out.
        device: "auto" (an accelerator if there is one), or torch's name of a device.
        offload: Where to keep block inputs between blocks: "cpu", "disk", or "auto" for the fastest that fits.
        overwrite: Do everything again.
        force: As of ``compress``.
        trust_remote_code: Let the model bring Python code of its own.
        notify: Called after every step; if left out, the run shows itself on a terminal and in a notebook.
        fields: Of the recipe, such as ``pattern="2:4"``, in the place of what it says.

    Returns:
        What ``compare.json`` holds; a method whose run failed is in ``failed``, and did not stop the others.

    Raises:
        InputError: Something given cannot be used, or ``out`` holds other results.
    """
    options = RunOptions(device, offload, listed(evaluate), evaluate_seqlen, limit, trust_remote_code)
    if isinstance(methods, Mapping):
        if recipe is not None or match is not None or sweep is not None:
            raise InputError(
                "Recipes were given for the methods, so recipe, match and sweep have no effect. Leave them out."
            )
        recipes = _given(methods, fields)
    else:
        names = names_of([methods] if isinstance(methods, str) else methods)
        recipes = recipes_for(as_recipe(recipe, fields), names, {}, match, sweep)
    with watched(notify) as tell:
        return run_comparison(
            model,
            recipes,
            out=out,
            options=options,
            tasks=load_tasks(listed(tasks), path=task_path),
            reports_only=reports_only,
            overwrite=overwrite,
            force=force,
            notify=tell,
        )


def _given(methods: Mapping[str, RecipeLike], fields: Mapping[str, Any]) -> dict[str, Recipe]:
    if not methods:
        raise InputError("There is no method to compare. Name at least one.")
    return {name: as_recipe(one, fields) for name, one in methods.items()}
