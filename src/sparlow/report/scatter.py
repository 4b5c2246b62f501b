"""Perplexity of many methods against their cost: names that do not collide, arrows to the matched ones, the front."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sparlow.report import svg
from sparlow.report.svg import Axis, Plot, colour

NAMED = 24  # methods of which each has its name in the picture; of more, only those on the front
REACH = (1.0, 1.8, 2.8, 4.0, 5.5)  # how far from its point a name may stand
AROUND = ((1, -0.6), (1, 0.9), (-1, -0.6), (-1, 0.9), (0, -1.2), (0, 1.6), (1, 0.1), (-1, 0.1))
GAP = 9  # pixels between a point and its name, at the nearest


@dataclass(frozen=True)
class Mark:
    """A method in the picture.

    Attributes:
        name: As in the table.
        series: Its colour.
        x: What it costs.
        y: Its perplexity.
        error: Of that, over seeds; 0 if there is one.
        to: Name of the same method with matching, to which an arrow leads.
    """

    name: str
    series: int
    x: float
    y: float
    error: float = 0.0
    to: str | None = None


def front(marks: Sequence[Mark]) -> list[Mark]:
    """Those that no other beats in both: none costs less and is as good."""
    best, found = math.inf, []
    for mark in sorted(marks, key=lambda mark: (mark.x, mark.y)):
        if mark.y < best:
            best = mark.y
            found.append(mark)
    return found


def scatter(marks: Sequence[Mark], x_label: str, dense: float | None, said: str, *, log_x: bool) -> str:
    """Perplexity against cost.

    Args:
        marks: Methods.
        x_label: Name and unit of the cost.
        dense: The dense model's perplexity, which is a line across.
        said: What the picture shows, for those who cannot see it.
        log_x: Whether equal ratios of cost have equal lengths.
    """
    shown = [mark for mark in marks if svg.drawable(mark.y, log=True) and svg.drawable(mark.x, log=log_x)]
    values = [mark.y for mark in shown] + ([] if dense is None else [dense])
    plot = Plot(
        Axis.over([mark.x for mark in shown], x_label, log=log_x, pad=0.12),
        Axis.over(values, "perplexity", log=True, pad=0.12),
        height=360,
    )
    if dense is not None:
        plot.rule(dense, "dense")
    places = {mark.name: plot.at(mark.x, mark.y) for mark in shown}
    if len(shown) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (places[mark.name] for mark in front(shown)))
        plot.add(f'<polyline class="front" points="{path}"><title>Pareto front</title></polyline>')
    for mark in shown:
        if mark.to in places:
            plot.add(_arrow(places[mark.name], places[mark.to]))
        if mark.error:
            _, low = plot.at(mark.x, max(mark.y - mark.error, plot.y.low))
            _, high = plot.at(mark.x, min(mark.y + mark.error, plot.y.high))
            plot.add(svg.segment(places[mark.name][0], low, places[mark.name][0], high, f"error {colour(mark.series)}"))
    for mark in shown:
        spread = f" ± {mark.error:.2f} over seeds" if mark.error else ""
        plot.dot(mark.x, mark.y, colour(mark.series), f"{mark.name}: perplexity {mark.y:.2f}{spread}")
    named = shown if len(shown) <= NAMED else front(shown)
    frame = (plot.left, plot.top, plot.right, plot.bottom)
    arrows = [(places[mark.name], places[mark.to]) for mark in shown if mark.to in places]
    avoided = [*places.values(), *(point for arrow in arrows for point in _along(*arrow))]
    for label in labels({mark.name: places[mark.name] for mark in named}, avoided, frame):
        plot.add(label.drawn)
    return plot.picture(said)


@dataclass(frozen=True)
class Label:
    """A name beside its point: the box that it takes, and its drawing."""

    name: str
    box: tuple[float, float, float, float]
    drawn: str


def labels(
    wanted: Mapping[str, tuple[float, float]],
    points: Sequence[tuple[float, float]],
    frame: tuple[float, float, float, float],
) -> list[Label]:
    """Find a place for each name where it covers no point, no other name, and nothing outside of the frame.

    A name that is far from its point is joined to it by a thin line. Where there is no free place, the one that
    covers least is taken.
    """
    placed: list[Label] = []
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    for name, (x, y) in sorted(wanted.items(), key=lambda one: (one[1][1], one[1][0])):
        best = min(
            ((_cost(box, taken, frame), reach, box) for reach, box in _boxes(name, x, y)),
            key=lambda found: (found[0], found[1]),
        )
        _, reach, box = best
        taken.append(box)
        placed.append(Label(name, box, _drawn(name, x, y, box, far=reach > REACH[1])))
    return placed


def _boxes(name: str, x: float, y: float) -> list[tuple[float, tuple[float, float, float, float]]]:
    """Where a name could stand, the nearest first."""
    width, height = svg.text_width(name), svg.FONT + 2
    found = []
    for reach in REACH:
        for dx, dy in AROUND:
            left = x + dx * GAP * reach - (width if dx < 0 else width / 2 if dx == 0 else 0)
            middle = y + dy * GAP * reach
            found.append((reach, (left, middle - height / 2, left + width, middle + height / 2)))
    return found


def _cost(
    box: tuple[float, float, float, float],
    taken: Sequence[tuple[float, float, float, float]],
    frame: tuple[float, float, float, float],
) -> float:
    """How much of what is there a box covers, and ten times what lies outside of the frame."""
    size = (box[2] - box[0]) * (box[3] - box[1])
    return sum(_overlap(box, other) for other in taken) + 10 * (size - _overlap(box, frame))


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0.0) * max(height, 0.0)


def _drawn(name: str, x: float, y: float, box: tuple[float, float, float, float], *, far: bool) -> str:
    said = svg.text(box[0], box[3] - 4, name, kind="name")
    if not far:
        return said
    end_x, end_y = min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3])
    return svg.segment(x, y, end_x, end_y, "lead") + said


def _along(start: tuple[float, float], end: tuple[float, float]) -> list[tuple[float, float]]:
    """Points of an arrow, so near to each other that no name fits between them."""
    count = int(math.dist(start, end) / 8)
    return [tuple(a + (b - a) * i / count for a, b in zip(start, end, strict=True)) for i in range(1, count)]  # type: ignore[misc]  # two


def _arrow(start: tuple[float, float], end: tuple[float, float]) -> str:
    """A line from one point to another with a head just before it."""
    length = math.dist(start, end)
    if length < 12:  # noqa: PLR2004 - pixels: there is no room for a head
        return ""
    dx, dy = (end[0] - start[0]) / length, (end[1] - start[1]) / length
    tip = (end[0] - 6 * dx, end[1] - 6 * dy)
    wing = [(tip[0] - 7 * dx + s * 3.2 * dy, tip[1] - 7 * dy - s * 3.2 * dx) for s in (1, -1)]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (tip, *wing))
    line = svg.segment(start[0] + 5 * dx, start[1] + 5 * dy, tip[0] - 5 * dx, tip[1] - 5 * dy, "arrow")
    return f'{line}<polygon class="head" points="{points}"/>'
