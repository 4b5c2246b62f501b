"""What ``sparlow compress`` says before a run, and what it checks after one."""

from collections.abc import Sequence
from pathlib import Path

from sparlow.cli import display
from sparlow.cli.requirements import Requirement, require_all
from sparlow.errors import InputError
from sparlow.planning.plan import plan
from sparlow.recipe.recipe import Recipe
from sparlow.recipe.run_options import RunOptions
from sparlow.report.records import Report
from sparlow.schema import values_of

TIMED = 10**8  # parameters from which the seconds of a probe are worth it


def tell_cost(model: str, recipe: Recipe, run: RunOptions, out: Path) -> None:
    """Say in one line what a run will take; minutes only where it is long. What is wrong is told by the run itself."""
    if display.out.quiet:  # by --quiet, or as the first of several processes speaks for all: nothing to foresee for
        return
    try:
        found = plan(model, recipe, out=out, **values_of(run), timed=False)
        if sum(kind.parameters for kind in found.layers) >= TIMED:
            found = plan(model, recipe, out=out, **values_of(run))
    except InputError:
        return
    display.show_cost(found)


def require_of_report(asked: Sequence[Requirement], report: Report) -> None:
    """Raise RunError unless a result keeps to what was required of it."""
    found = {
        "perplexity": report.compressed["perplexity"],
        "bits": {"": report.bits_per_weight},
        "bytes": {"": report.bytes["compressed"]},
        "relative_error": {"": report.mean_relative_error},
    }
    require_all(asked, found, {"perplexity": report.dense["perplexity"], "bytes": {"": report.bytes["dense"]}})
