"""What ``sparlow compare`` takes beyond a recipe, says before it starts, and shows; torch is imported where used."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparlow.cli import display
from sparlow.cli.options import Given, parse_named_pairs, split
from sparlow.cli.tables import show_wide
from sparlow.files import human_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sparlow.recipe.recipe import Recipe
    from sparlow.recipe.run_options import RunOptions
    from sparlow.report.comparison import Comparison

NAMED = 4  # runs whose times are told one by one


@dataclass(frozen=True)
class CompareOptions:
    """Which methods are compared, in which variants, and what is kept of each."""

    algorithms: Annotated[
        list[str],
        typer.Option(
            metavar="NAMES",
            rich_help_panel="Solver",
            help="Algorithms to compare: usual, all, or names. Repeat it, or separate by commas.",
        ),
    ] = field(default_factory=lambda: ["usual"])
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ALGORITHM.KEY=VALUE",
            rich_help_panel="Solver",
            help="An option of one of the algorithms. Repeat it for several.",
        ),
    ] = None
    match: Annotated[
        str | None,
        typer.Option(
            metavar="no|yes|both",
            rich_help_panel="Matching",
            help="Train what is kept towards the dense model. both compares every algorithm without and with it.",
            show_default="no, or the recipe's",
        ),
    ] = None
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            "--sweep",
            metavar="FIELD=VALUES",
            rich_help_panel="What to keep",
            help="Run every method with each of these: pattern=2:4,16:32 or rank=0,16 or values=model,int4. Repeat it "
            "for several; every combination is run.",
        ),
    ] = None
    seeds: Annotated[
        list[str] | None,
        typer.Option(
            "--seeds",
            metavar="NUMBERS",
            rich_help_panel="Calibration",
            help="Run every method with calibration windows chosen by each of these seeds; tables show mean and "
            "spread.",
        ),
    ] = None
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks",
            metavar="NAMES",
            rich_help_panel="Tasks",
            help="Tasks that every model answers: paper (its eight zero-shot tasks), mmlu, or any name of lm-eval or "
            "--task-path.",
        ),
    ] = None
    task_path: Annotated[
        Path | None,
        typer.Option(
            "--task-path",
            metavar="DIRECTORY",
            rich_help_panel="Tasks",
            help="Directory of task files (.yaml). They take precedence over lm-eval's tasks of the same name.",
        ),
    ] = None
    reports_only: Annotated[
        bool,
        typer.Option(
            "--reports-only",
            rich_help_panel="Output",
            help="Keep no model, only its report and recipe in DIRECTORY/reports.",
        ),
    ] = False
    timed: Annotated[
        bool,
        typer.Option(
            "--time/--no-time",
            rich_help_panel="Output",
            help="Say first how long all runs will take, by trying each method on small layers.",
        ),
    ] = True

    def recipes(self, given: Given) -> "dict[str, Recipe]":
        """Return the recipe of each run, by its name; InputError if these options do not go together."""
        from sparlow.run.cases import names_of, parse_sweep, recipes_for

        if self.match is not None:
            given = replace(given, changes={**given.changes, "match": self.match != "no"})
        varied = parse_sweep(self.sweep or (), split(self.seeds or ()))
        options = parse_named_pairs(self.option or ())
        return recipes_for(given.recipe(), names_of(split(self.algorithms)), options, self.match, varied)


def tell_times(model: str, recipes: "Mapping[str, Recipe]", out: Path, options: "RunOptions", *, kept: bool) -> None:
    """Say how long the runs that are not there yet will take, and how much disk what they leave."""
    from sparlow.report.wording import duration
    from sparlow.run.compare import foresee

    with display.progress() as notify:
        found = foresee(model, recipes, out=out, options=options, notify=notify)
    if not found.seconds:
        display.out.print("Every run is there already.", highlight=False)
        return
    longest = sorted(found.seconds, key=lambda name: -found.seconds[name])
    told = ", ".join(f"{name} {duration(found.seconds[name])}" for name in longest[:NAMED])
    more = ", …" if len(longest) > NAMED else ""
    count = f"{len(longest)} run{'s' if len(longest) > 1 else ''}"
    disk = f"; {human_bytes(found.bytes)} in {out}" if kept else ""
    display.out.print(
        f"{count}, about {duration(sum(found.seconds.values()))} ({told}{more}){disk}", markup=False, highlight=False
    )


def show_comparison(found: "Comparison") -> None:
    """The table of a comparison: the dense model, then a line a method."""
    from sparlow.report.compare_page import task_table
    from sparlow.report.perplexities import labelled, shown, with_error

    corpora = shown([found.dense.get("perplexity", {}), *(row.perplexity for row in found.rows)])
    same = found.evaluation.get("in_domain", ())
    labels = [labelled(Path(name).name, [Path(name).name] if name in same else ()) for name in corpora]
    divergences = [name for name in corpora if any(row.agreement.get(name) for row in found.rows)]
    labels += [f"divergence, {Path(name).name}" for name in divergences]
    head = ("", *labels, "relative squared error", "values", "seconds", "size", "bits", "bits, whole file", "of blocks")
    rows = []
    if found.dense:
        perplexities = (f"{found.dense['perplexity'][name]:.2f}" for name in corpora)
        none = ("0",) * len(divergences)
        rows.append(("dense", *perplexities, *none, "0", "–", "–", human_bytes(found.dense["bytes"]), "–", "–", "–"))
    for row in found.rows:
        perplexities = (f"{row.perplexity[name]:.2f}" for name in corpora)
        known = (row.agreement.get(name) for name in divergences)
        apart = (with_error(one.divergence, one.divergence_stderr) if one else "–" for one in known)
        measured = (f"{row.mean_relative_error:.5f}", row.values, f"{row.seconds:.0f}", human_bytes(row.bytes))
        bits = (f"{row.bits_per_weight:.2f}", f"{row.bits_per_parameter:.2f}", f"{row.share_compressed:.1%}")
        rows.append((row.name, *perplexities, *apart, *measured, *bits))
    show_wide(display.out, head, rows)
    tasks, scores = task_table(found)
    if scores:
        show_wide(display.out, ("", *tasks[1:]), scores)
