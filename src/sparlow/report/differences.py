"""What a comparison says beyond its rows: differences over the same windows, and the spread over seeds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from sparlow.report.comparison import Row

SHARES = ("acc_norm", "acc", "exact_match")  # shares of right answers: only these are averaged


@dataclass(frozen=True)
class Difference:
    """The mean over windows of a difference of losses, in nats a token, and its standard error."""

    mean: float
    stderr: float


def paired(losses: Sequence[float], others: Sequence[float]) -> Difference | None:
    """How much larger the losses of a method are than those of another on the same windows.

    Windows differ from each other more than methods do on one window, so the error of this is far smaller than that of
    a difference of means. None where the windows are not the same, or fewer than two.
    """
    if len(losses) != len(others) or len(losses) < 2:  # noqa: PLR2004 - a spread takes two
        return None
    apart = [one - other for one, other in zip(losses, others, strict=True)]
    if not all(map(math.isfinite, apart)):
        return None
    return Difference(fmean(apart), stdev(apart) / math.sqrt(len(apart)))


def mean_of_tasks(results: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Mean over tasks; None if there are none, or the figure of one is no share of right answers."""
    if not results or any(result["metric"].partition(",")[0] not in SHARES for result in results.values()):
        return None
    return fmean(result["value"] for result in results.values())


def best(rows: Sequence[Row], corpus: str) -> Row | None:
    """The row of the lowest perplexity on a text."""
    known = [row for row in rows if math.isfinite(row.perplexity.get(corpus, math.nan))]
    return min(known, key=lambda row: row.perplexity[corpus], default=None)


@dataclass(frozen=True)
class Group:
    """Rows that differ in the seed only.

    Attributes:
        name: Without the seed.
        rows: One a seed.
    """

    name: str
    rows: tuple[Row, ...]

    def mean(self, corpus: str) -> float:
        """Mean perplexity."""
        return fmean(row.perplexity[corpus] for row in self.rows)

    def spread(self, corpus: str) -> float:
        """Standard deviation of the perplexity over seeds; 0 of a single one."""
        values = [row.perplexity[corpus] for row in self.rows]
        return stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else 0.0


def groups(rows: Sequence[Row]) -> list[Group]:
    """Put rows together that differ in the seed only, in their order."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.group or row.name, []).append(row)
    return [Group(name, tuple(some)) for name, some in found.items()]
