"""Records that people look at: as a dict for files, a table for pandas, text for a terminal, HTML for a notebook."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from sparlow.errors import InputError, printable
from sparlow.files import plain

SHOWN = 12  # rows of a table in a notebook


class Tabular:
    """What all results have in common. A result says what it knows as ``facts``, and what its rows are as ``table``."""

    def facts(self) -> Mapping[str, str]:
        """What to see first, by its name, in words."""
        raise NotImplementedError

    def table(self) -> Sequence[Mapping[str, Any]]:
        """The rows, each by the name of the column."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """All of it, as a JSON file holds it."""
        found: dict[str, Any] = plain(self)
        return found

    def to_dataframe(self) -> Any:  # noqa: ANN401 - pandas is optional, and has no types of its own
        """The rows as a DataFrame of pandas.

        Raises:
            InputError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError:
            raise InputError("A DataFrame needs the package pandas. Run: pip install pandas") from None
        return pd.DataFrame([dict(row) for row in self.table()])

    def __repr__(self) -> str:
        """A line each for the facts."""
        facts = self.facts()
        width = max(map(len, facts), default=0)
        lines = [f"  {name:<{width}}  {printable(value)}" for name, value in facts.items()]
        return "\n".join([type(self).__name__, *lines])

    def _repr_html_(self) -> str:
        """The facts, and the first rows below them."""
        facts = _html(("", ""), [tuple(pair) for pair in self.facts().items()])
        rows = self.table()
        names = list(dict.fromkeys(name for row in rows[:SHOWN] for name in row))
        table = _html(names, [tuple(_text(row.get(name)) for name in names) for row in rows[:SHOWN]]) if names else ""
        more = f"<p>and {len(rows) - SHOWN:,} more rows: see to_dataframe()</p>" if len(rows) > SHOWN else ""
        return f"<h4>{escape(type(self).__name__)}</h4>{facts}{table}{more}"


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    return "" if value is None else str(value)


def _html(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(printable(c))}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table>{f'<thead><tr>{top}</tr></thead>' if any(head) else ''}<tbody>{body}</tbody></table>"
