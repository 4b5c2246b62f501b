"""The table of experts on the page of a run: how many tokens they saw, a row for each parameter that holds experts."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sparlow.report.wording import UNKNOWN, percent, plain

HEAD = ("block", "parameter", "experts", "tokens of an expert", "share of the routed tokens", "without tokens")


def expert_rows(experts: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Yield the rows below ``HEAD``, from the fewest tokens to the most; experts that stayed dense were not counted."""
    for row in experts:
        tokens = sorted(count for count in row["tokens"] if count is not None)
        shares = sorted(share for share in row["shares"] if share is not None)
        seen = (_range([plain(count) for count in tokens]), _range([percent(share) for share in shares]))
        yield (str(row["block"]), row["name"], plain(row["experts"]), *seen, plain(len(row["unreached"])))


def _range(said: Sequence[str]) -> str:
    """From the first to the last of some that are in order."""
    if not said:
        return UNKNOWN
    return said[0] if said[0] == said[-1] else f"{said[0]} to {said[-1]}"
