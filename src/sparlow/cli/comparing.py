"""What ``sparlow compare`` takes beyond a recipe, and what it says before it starts; torch is imported where used."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparlow.cli import display

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sparlow.recipe.recipe import Recipe
    from sparlow.recipe.run_options import RunOptions

Sweep = Annotated[
    list[str] | None,
    typer.Option(
        "--sweep",
        metavar="FIELD=VALUES",
        rich_help_panel="What to keep",
        help="Run every method with each of these: pattern=2:4,16:32 or rank=0,16 or values=model,int4. Repeat it for "
        "several; every combination is run.",
    ),
]
Seeds = Annotated[
    list[str] | None,
    typer.Option(
        "--seeds",
        metavar="NUMBERS",
        rich_help_panel="Calibration",
        help="Run every method with calibration windows chosen by each of these seeds; tables show mean and spread.",
    ),
]
TasksOfAll = Annotated[
    list[str] | None,
    typer.Option(
        "--tasks",
        metavar="NAMES",
        rich_help_panel="Tasks",
        help="Tasks that every model answers: paper (its eight zero-shot tasks), mmlu, or any name of lm-eval or "
        "--task-path.",
    ),
]
TaskPath = Annotated[
    Path | None,
    typer.Option(
        "--task-path",
        metavar="DIRECTORY",
        rich_help_panel="Tasks",
        help="Directory of task files (.yaml). They take precedence over lm-eval's tasks of the same name.",
    ),
]
ReportsOnly = Annotated[
    bool,
    typer.Option(
        "--reports-only",
        rich_help_panel="Output",
        help="Keep no model, only its report and recipe in DIRECTORY/reports.",
    ),
]
Foretold = Annotated[
    bool,
    typer.Option(
        "--time/--no-time",
        rich_help_panel="Output",
        help="Say first how long all runs will take, by trying each method on small layers.",
    ),
]
NAMED = 4  # runs whose times are told one by one


def tell_times(model: str, recipes: "Mapping[str, Recipe]", out: Path, options: "RunOptions", *, kept: bool) -> None:
    """Say how long the runs that are not there yet will take, and how much disk what they leave."""
    from sparlow.files import human_bytes
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
