"""What ``sparlow evaluate`` does for each model, and when what it found is a failure."""

import math
from collections.abc import Mapping
from pathlib import Path

from sparlow.cli import display
from sparlow.cli.options import EvaluateOptions
from sparlow.errors import RunError
from sparlow.evaluation.perplexity import Evaluation, require_tokenizer
from sparlow.evaluation.perplexity import evaluate as measure
from sparlow.evaluation.tasks import LoadedTasks
from sparlow.files import RECORD
from sparlow.machine import pick_device
from sparlow.model.loading.source import open_model, upcast_for_cpu
from sparlow.progress import labelled
from sparlow.recipe.recipe import Recipe
from sparlow.recipe.run_options import RunOptions
from sparlow.text import in_domain


def measured(name: str, dtype: str, options: EvaluateOptions, run: RunOptions, tasks: LoadedTasks) -> Evaluation:
    """Open a model and measure it."""
    opened = open_model(name, dtype=dtype, device=pick_device(run.device), trust_remote_code=run.trust_remote_code)
    tokenizer = require_tokenizer(opened.tokenizer, name)
    with display.progress() as notify:
        return measure(
            upcast_for_cpu(opened.model),
            tokenizer,
            perplexity_on=options.perplexity,
            seqlen=options.seqlen,
            limit=options.limit,
            column=options.column,
            tasks=tasks,
            batch_size=options.batch_size,
            notify=labelled(notify, after=f", {name}"),
        )


def in_domain_of(found: Mapping[str, Evaluation]) -> dict[str, list[str]]:
    """Return, by model, the texts from the source of its calibration text, where that is on record."""
    files = {name: Path(name) / "recipe.toml" for name in found}
    recipes = {name: Recipe.from_file(file) for name, file in files.items() if (file.parent / RECORD).is_file()}
    return {name: in_domain(recipe.calibration, found[name]["perplexity"]) for name, recipe in recipes.items()}


def require_numbers(found: Mapping[str, Evaluation]) -> None:
    """Raise RunError, with model and corpus, for a perplexity that is no number: the model is damaged, or overflows."""
    for name, evaluation in found.items():
        for corpus, value in evaluation["perplexity"].items():
            if not math.isfinite(value):
                raise RunError(
                    f"The perplexity of {name} on {corpus} is {value}, not a finite number. Check the model's weights, "
                    "or use --dtype float32."
                )
