"""What ``sparlow evaluate`` does for each model and shows of it, and when what it found is a failure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from rich.markup import escape

from sparlow.cli import display
from sparlow.cli.options import EvaluateOptions
from sparlow.cli.requirements import Requirement, require_all
from sparlow.cli.tables import table
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
from sparlow.report.perplexities import FLATTERS, agreement_rows, shown
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


def show_evaluations(
    found: Mapping[str, Evaluation],
    seqlen: int,
    in_domain: Mapping[str, Sequence[str]] = MappingProxyType({}),
    notes: Sequence[str] = (),
) -> None:
    """The result of ``sparlow evaluate``: a column a model, lines a corpus or task, then the mean of the tasks.

    Args:
        found: By the name of the model.
        seqlen: Tokens in a window.
        in_domain: Names of texts that come from the source of the model's calibration text, by the name of the model.
        notes: Sentences to add.
    """
    first = next(iter(found.values()))
    same = {name for names in in_domain.values() for name in names}
    rows = []
    for name in shown([one["perplexity"] for one in found.values()]):
        label = f"perplexity (seqlen {seqlen}), {name}"
        label += f" ({FLATTERS.format('calibration')})" if name in same else ""
        measured = [(one["perplexity"][name], one["perplexity_stderr"][name]) for one in found.values()]
        rows.append((label, *(_with_error(*figures) for figures in measured)))
        beside = [one["agreement"] for one in found.values() if "agreement" in one]  # of the last, if there are two
        for agreement in beside:
            rows += [(what, "–", value) for what, value in agreement_rows(name, agreement[name])]
    for name, result in first.get("tasks", {}).items():
        label = f"{name}, {result['metric']}" + (f", {result['fewshot']}-shot" if result["fewshot"] else "")
        results = [one["tasks"][name] for one in found.values()]
        rows.append((label, *(_with_error(one["value"], one["stderr"]) for one in results)))
    means = [one.get("average") for one in found.values()]
    if len(first.get("tasks", {})) > 1 and None not in means:
        rows.append(("average", *(f"{mean:.4f}" for mean in means)))
    short = [Path(name).name or name for name in found]
    display.out.print(table(("", *(short if len(set(short)) == len(short) else found)), rows))
    for note in notes:
        display.out.print(f"note: {escape(note)}", highlight=False)


def _with_error(value: float, stderr: float | None) -> str:
    return f"{value:.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")
