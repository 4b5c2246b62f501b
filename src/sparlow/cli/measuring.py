"""The page of ``sparlow benchmark``: where it goes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from sparlow.cli import display
from sparlow.errors import InputError

HtmlFile = Annotated[
    Path | None,
    typer.Option(
        "--html", metavar="FILE", rich_help_panel="Output", help="Also write a page with charts to this file."
    ),
]


def require_folder(file: Path | None) -> None:
    """Check before the work that the page can be written."""
    if file is not None and not file.parent.is_dir():
        raise InputError(f"There is no directory {file.parent} for --html {file.name}. Create it first.")


def write_page(found: Mapping[str, Any], file: Path | None) -> None:
    """Write the page, if one is wanted; say where."""
    if file is None:
        return
    from sparlow.files import replacing
    from sparlow.report.benchmark_page import html

    with replacing(file) as partial:
        partial.write_text(html(found), encoding="utf-8")
    display.out.print(f"open {file}", markup=False, highlight=False)
