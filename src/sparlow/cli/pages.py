"""Pages and figures as files of their own: the page of ``sparlow benchmark``, and ``--figures``."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparlow.cli import display
from sparlow.cli.leaving import speaks
from sparlow.errors import InputError

if TYPE_CHECKING:
    from sparlow.report.svg import Chart

HtmlFile = Annotated[
    Path | None,
    typer.Option(
        "--html", metavar="FILE", rich_help_panel="Output", help="Also write a page with charts to this file."
    ),
]
Figures = Annotated[
    Path | None,
    typer.Option(
        "--figures",
        metavar="DIRECTORY",
        rich_help_panel="Output",
        help="Also write each chart of the page to this directory, as an SVG file.",
    ),
]


def require_places(page: Path | None = None, figures: Path | None = None) -> None:
    """Check before the work that its pages and figures can be written."""
    if page is not None and not page.parent.is_dir():
        raise InputError(f"There is no directory {page.parent} for --html {page.name}. Create it first.")
    if figures is not None and figures.exists() and not figures.is_dir():
        raise InputError(f"{figures} is a file. Give a directory with --figures.")


def write_page(found: Mapping[str, Any], file: Path | None) -> None:
    """Write the page of a benchmark, if one is wanted; say where."""
    if file is None:
        return
    from sparlow.files import replacing
    from sparlow.report.benchmark_page import html

    with replacing(file) as partial:
        partial.write_text(html(found), encoding="utf-8")
    display.out.print(f"open {file}", markup=False, highlight=False)


def write_figures(charts: "Iterable[Chart]", folder: Path | None) -> None:
    """Write charts as files, if they are wanted; of several processes one is enough."""
    if folder is None or not speaks():
        return
    from sparlow.files import replacing
    from sparlow.report.svg import as_file

    folder.mkdir(parents=True, exist_ok=True)
    for chart in charts:
        with replacing(folder / f"{chart.name}.svg") as partial:
            partial.write_text(as_file(chart.svg), encoding="utf-8")
    display.out.print(f"figures written to {folder}", markup=False, highlight=False)
