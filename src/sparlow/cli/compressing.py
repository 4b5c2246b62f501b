"""What ``sparlow compress`` says before a run, and what it and ``sparlow finetune`` check after one."""

from collections.abc import Sequence
from pathlib import Path

from sparlow.cli import display
from sparlow.cli.planning import show_cost
from sparlow.cli.requirements import Requirement, require_all
from sparlow.errors import InputError
from sparlow.files import RECORD
from sparlow.model.loading.source import resolve_model_path
from sparlow.planning.plan import plan
from sparlow.recipe.recipe import Recipe
from sparlow.recipe.run_options import RunOptions
from sparlow.report.records import Report
from sparlow.schema import values_of

TIMED = 10**8  # parameters from which the seconds of a probe are worth it


def tell_needs(model: str, recipe: Recipe, run: RunOptions, out: Path) -> None:
    """Say in one line what a run will take; minutes only where it is long. What is wrong is told by the run itself."""
    if display.out.quiet:  # by --quiet, or as the first of several processes speaks for all: nothing to foresee for
        return
    try:
        source = resolve_model_path(model)  # a .gguf file is converted now, and its header not read for the plan alone
        found = plan(source, recipe, out=out, **values_of(run), timed=TIMED)
    except InputError:
        return
    show_cost(found)


def measured_dense(folder: Path) -> list[str]:
    """Return the texts on which compress measured the dense model, by the report in a directory.

    Raises:
        InputError: There is none.
    """
    if not (folder / RECORD).exists():
        raise InputError(f"{folder} holds no result of sparlow. Give one that compress wrote.")
    return [*Report.from_file(folder / "report.json").dense.get("perplexity", {})]


def require_of_finetuning(asked: Sequence[Requirement], report: Report) -> None:
    """Raise RunError unless what fine-tuning made keeps to what was required of it."""
    found = {
        "perplexity": report.finetuning["perplexity"]["after"],
        "bits": {"": report.bits_per_weight},
        "bytes": {"": report.bytes["compressed"]},
    }
    dense = {"perplexity": report.finetuning["dense"], "bytes": {"": report.bytes["dense"]}}
    require_all(asked, found, dense)


def require_of_report(asked: Sequence[Requirement], report: Report) -> None:
    """Raise RunError unless a result keeps to what was required of it."""
    found = {
        "perplexity": report.compressed["perplexity"],
        "bits": {"": report.bits_per_weight},
        "bytes": {"": report.bytes["compressed"]},
        "relative_error": {"": report.mean_relative_error},
    }
    require_all(asked, found, {"perplexity": report.dense["perplexity"], "bytes": {"": report.bytes["dense"]}})
