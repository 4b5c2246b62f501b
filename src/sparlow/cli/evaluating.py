"""What ``sparlow evaluate`` does for each model, and when what it found is a failure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from sparlow.cli import display
from sparlow.cli.options import EvaluateOptions
from sparlow.cli.requirements import Requirement, require_all
from sparlow.errors import RunError
from sparlow.evaluation.perplexity import Baseline, Evaluation
from sparlow.evaluation.perplexity import evaluate as measure
from sparlow.evaluation.tasks import LoadedTasks
from sparlow.evaluation.texts import require_tokenizer
from sparlow.files import RECORD, read_json
from sparlow.machine import pick_device
from sparlow.model.loading.source import OpenedModel, open_model, upcast_for_cpu
from sparlow.progress import labelled
from sparlow.recipe.run_options import RunOptions
from sparlow.text import in_domain


def measured_beside(
    model: str, dtype: str, options: EvaluateOptions, run: RunOptions, tasks: LoadedTasks
) -> dict[str, Evaluation]:
    """Measure the baseline, if there is one, then the model beside it, of which never both are in memory as a whole."""
    found: dict[str, Evaluation] = {}
    dense = None
    if options.baseline is not None:
        found[options.baseline], dense = _baseline(options.baseline, dtype, options, run, tasks)
    if model not in found:
        found[model] = _measured(_opened(model, dtype, run), model, options, tasks, dense)
        if options.baseline is not None:
            found[model].setdefault("agreement", dict.fromkeys(found[model]["perplexity"]))
    return found


def unknown_agreement(found: Mapping[str, Evaluation], baseline: str | None) -> list[str]:
    """Return a sentence for each text on which two models could not be compared."""
    names = [name for one in found.values() for name, figure in one.get("agreement", {}).items() if figure is None]
    return [
        f"The agreement with {baseline} on {name} is not known: the two models read different tokens, or one of them "
        "has no head that can be run apart from its blocks."
        for name in names
    ]


def _opened(name: str, dtype: str, run: RunOptions) -> OpenedModel:
    found = open_model(name, dtype=dtype, device=pick_device(run.device), trust_remote_code=run.trust_remote_code)
    return replace(found, model=upcast_for_cpu(found.model))


def _baseline(
    name: str, dtype: str, options: EvaluateOptions, run: RunOptions, tasks: LoadedTasks
) -> tuple[Evaluation, Baseline | None]:
    """Measure a baseline; return also what is kept of it to compare with, if anything."""
    opened = _opened(name, dtype, run)
    dense = Baseline(opened.model)
    found = _measured(opened, name, options, tasks, dense)
    return found, dense if dense.release_blocks() else None


def _measured(
    opened: OpenedModel, name: str, options: EvaluateOptions, tasks: LoadedTasks, dense: Baseline | None
) -> Evaluation:
    tokenizer = require_tokenizer(opened.tokenizer, name)
    with display.progress() as notify:
        return measure(
            opened.model,
            tokenizer,
            evaluate=options.evaluate,
            seqlen=options.seqlen,
            limit=options.limit,
            column=options.column,
            tasks=tasks,
            batch_size=options.batch_size,
            baseline=dense,
            notify=labelled(notify, after=f", {name}"),
        )


def in_domain_of(found: Mapping[str, Evaluation]) -> dict[str, list[str]]:
    """Return, by model, the texts from the source of its calibration text, where that is on record."""
    results = [name for name in found if (Path(name) / RECORD).is_file()]
    return {name: in_domain(_calibration(Path(name)), found[name]["perplexity"]) for name in results}


def _calibration(folder: Path) -> str:
    """Return the calibration of a result; its whole recipe may name an algorithm that is not there any more."""
    recipe = read_json(folder / RECORD).get("fingerprint", {}).get("recipe", {})
    return str(recipe.get("calibration", ""))


def require_of_evaluations(
    asked: Sequence[Requirement], found: Mapping[str, Evaluation], model: str, baseline: str | None
) -> None:
    """Raise RunError unless the perplexities of a model keep to what was required."""
    dense = {"perplexity": found[baseline]["perplexity"]} if baseline is not None else {}
    require_all(asked, {"perplexity": found[model]["perplexity"]}, dense)


def require_numbers(found: Mapping[str, Evaluation]) -> None:
    """Raise RunError, with model and corpus, for a perplexity that is no number: the model is damaged, or overflows."""
    for name, evaluation in found.items():
        for corpus, value in evaluation["perplexity"].items():
            if not math.isfinite(value):
                raise RunError(
                    f"The perplexity of {name} on {corpus} is {value}, not a finite number. Check the model's weights, "
                    "or use --dtype float32."
                )
