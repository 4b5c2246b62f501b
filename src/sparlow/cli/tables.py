"""Tables on the terminal; one that is wider than the terminal is shown in pieces that fit."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from sparlow.errors import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

GAP = 2  # blanks between columns


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, left: bool = False) -> "Table":
    """Return a table; its first column is text, the others are numbers unless ``left`` says that they are text."""
    from rich.markup import escape
    from rich.table import Table

    found = Table(box=None, pad_edge=False, header_style="bold")
    for i, title in enumerate(head):
        found.add_column(escape(title), justify="right" if i and not left else "left", overflow="fold")
    for row in rows:
        found.add_row(*(escape(printable(cell)) for cell in row))  # before its width is measured
    return found


def show_wide(
    out: "Console", head: Sequence[str], rows: Sequence[Sequence[str]], *, keys: int = 1, left: bool = False
) -> None:
    """Print a table, or several below each other that repeat the first ``keys`` columns, where one is too wide."""
    for i, columns in enumerate(pieces(head, rows, keys, out.width)):
        if i:
            out.print()
        out.print(table([head[c] for c in columns], [[row[c] for c in columns] for row in rows], left=left))


def pieces(head: Sequence[str], rows: Sequence[Sequence[str]], keys: int, width: int) -> list[list[int]]:
    """Return which columns stand beside each other in so many letters; the first ``keys`` are in every piece."""
    widths = [max(len(printable(line[i])) for line in (head, *rows)) + GAP for i in range(len(head))]
    room = width + GAP - sum(widths[:keys])
    found: list[list[int]] = [[]]
    for i in range(keys, len(head)):
        if found[-1] and sum(widths[c] for c in (*found[-1], i)) > room:
            found.append([])
        found[-1].append(i)
    return [[*range(keys), *columns] for columns in found]
