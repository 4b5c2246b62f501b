"""Charts as SVG, made by hand: axes with ticks and units, lines, points, bars and cells, each with its value on hover.

Colours are classes (``c0`` to ``c7``, ``heat``, ``muted``), to which the page's style gives values for light and dark;
``as_file`` puts that style into a chart that stands alone.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib.resources import files

from sparlow.report.wording import raised

COLOURS = 8  # in the style
FONT = 13  # pixels, in a chart of ``WIDTH``
WIDTH, HEIGHT = 480, 280
BEYOND = 1e15  # numbers of that size, or its inverse, are left out of charts: all others would be one point
GLYPH = 0.62  # of the font's size: the width of a character, on average


def drawable(value: float, *, log: bool) -> bool:
    """Whether a chart shows a value: a finite one, on a logarithmic axis above zero, and none beyond all others."""
    return abs(value) < BEYOND and (value > 1 / BEYOND or not log)


@dataclass(frozen=True)
class Axis:
    """A range of numbers with its name and unit.

    Attributes:
        label: Name and unit.
        low: The smallest number shown.
        high: The largest.
        log: Whether equal ratios have equal lengths.
        whole: Whether only whole numbers are marked.
    """

    label: str
    low: float
    high: float
    log: bool = False
    whole: bool = False

    @classmethod
    def over(cls, values: Iterable[float], label: str, *, log: bool = False, pad: float = 0.06) -> "Axis":
        """Return an axis that shows all of the values that are finite, and with ``log`` above zero."""
        found = [value for value in values if drawable(value, log=log)]
        low, high = (min(found), max(found)) if found else (0.1, 1.0)
        if log:
            more = (high / low) ** pad if high > low else 1.5
            return cls(label, low / more, high * more, log=True)
        more = pad * (high - low) or abs(high) / 2 or 1.0
        return cls(label, low - more, high + more)

    def share(self, value: float) -> float:
        """Where a value lies: 0 at the beginning of the axis, 1 at its end."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def shows(self, value: float) -> bool:
        """Whether a value can be drawn here."""
        return drawable(value, log=self.log)

    def ticks(self, most: int = 6) -> list[float]:
        """Round numbers within the range, at least two of them wherever the range is not empty."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            for steps in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
                found = [step * 10.0**e for e in range(first, last + 1) for step in steps]
                found = [value for value in found if self.low <= value <= self.high]
                if len(found) <= most:
                    break
            while len(found) > most:
                found = found[::2]
            if len(found) > 1:
                return found
        return self._even(most)

    def _even(self, most: int) -> list[float]:
        rough = (self.high - self.low) / most
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * of for of in (1, 2, 5, 10) if unit * of >= rough)
        step = max(step, 1.0) if self.whole else step
        first = math.ceil(self.low / step - 1e-9)
        count = math.floor((self.high - first * step) / step + 1e-9)
        return [round((first + i) * step, 12) for i in range(count + 1)]


@dataclass(frozen=True)
class Chart:
    """A picture with what stands around it.

    Attributes:
        name: Of its file.
        title: One line.
        about: A sentence on what it shows.
        svg: The picture.
        key: What its colours mean: class and name.
        wide: Whether it takes the whole width.
    """

    name: str
    title: str
    about: str
    svg: str
    key: tuple[tuple[str, str], ...] = ()
    wide: bool = False


def counted(label: str, values: Iterable[int]) -> Axis:
    """An axis of whole numbers."""
    found = [*values]
    return Axis(label, min(found), max(found) if max(found) > min(found) else min(found) + 1, whole=True)


def text_width(text: str) -> float:
    """About how wide a text is."""
    return GLYPH * FONT * len(text)


def text(x: float, y: float, said: str, *, anchor: str = "start", kind: str = "tick") -> str:
    """A line of text; ``anchor`` is start, middle or end."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(said)}</text>'


def segment(x1: float, y1: float, x2: float, y2: float, kind: str, more: str = "") -> str:
    """A straight line."""
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"{more}/>'


def box(x: float, y: float, width: float, height: float, kind: str, title: str = "", more: str = "") -> str:
    """A rectangle with its value on hover."""
    said = f"<title>{escape(title)}</title>" if title else ""
    place = f'x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{max(height, 0):.1f}"'
    return f'<rect class="{kind}" {place}{more}>{said}</rect>'


def drawing(parts: Iterable[str], width: float, height: float, said: str, *, wide: bool = False) -> str:
    """The whole picture. ``said`` is what a reader hears who cannot see it; a ``wide`` one keeps its size."""
    kind, fixed = ("wide", f' width="{width:.0f}" height="{height:.0f}"') if wide else ("chart", "")
    head = f'<svg class="{kind}" viewBox="0 0 {width:.0f} {height:.0f}"{fixed} role="img" aria-label="{escape(said)}">'
    return head + "".join(parts) + "</svg>"


@cache
def style() -> str:
    """The colours and lines of charts, for a page or a file."""
    return (files("sparlow.report") / "templates" / "chart.css").read_text("utf-8")


def as_file(chart: str) -> str:
    """A chart that is a file of its own."""
    head = '<svg xmlns="http://www.w3.org/2000/svg" '
    opened, rest = chart.replace("<svg ", head, 1).split(">", 1)
    return f'{opened}><style>{style()}</style><rect class="paper" width="100%" height="100%"/>{rest}\n'


class Plot:
    """A chart with two axes, to which marks are added.

    Args:
        x: What goes to the right.
        y: What goes up.
        height: Of the picture.
    """

    def __init__(self, x: Axis, y: Axis, height: float = HEIGHT) -> None:
        self.x, self.y, self.height = x, y, height
        widest = max((text_width(tick_text(value)) for value in y.ticks()), default=0)
        self.left, self.right, self.top, self.bottom = widest + 30, WIDTH - 14, 12, height - 44
        self._marks: list[str] = []

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point lies in the picture."""
        across = self.left + self.x.share(x) * (self.right - self.left)
        return across, self.bottom - self.y.share(y) * (self.bottom - self.top)

    def line(self, points: Sequence[tuple[float, float]], kind: str, title: str) -> None:
        """A line through points, those left out that cannot be drawn; a single one is a dot."""
        shown = [self.at(x, y) for x, y in points if self.x.shows(x) and self.y.shows(y)]
        if len(shown) == 1:
            self._marks.append(circle(*shown[0], kind, title))
        elif shown:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in shown)
            self._marks.append(
                f'<polyline class="line {kind}" points="{path}"><title>{escape(title)}</title></polyline>'
            )

    def dot(self, x: float, y: float, kind: str, title: str) -> None:
        """A point, if it can be drawn."""
        if self.x.shows(x) and self.y.shows(y):
            self._marks.append(circle(*self.at(x, y), kind, title))

    def rule(self, y: float, said: str) -> None:
        """A line across, with its name at its end."""
        if self.y.shows(y) and self.y.low <= y <= self.y.high:
            _, height = self.at(self.x.low, y)
            self._marks += [
                segment(self.left, height, self.right, height, "rule"),
                text(self.right, height - 4, said, anchor="end"),
            ]

    def add(self, mark: str) -> None:
        """Anything else, in the picture's own measures."""
        self._marks.append(mark)

    def picture(self, said: str) -> str:
        """The chart as SVG."""
        frame = [*self._frame(), *self._marks]
        return drawing(frame, WIDTH, self.height, said)

    def _frame(self) -> Iterable[str]:
        for value in self.y.ticks():
            _, y = self.at(self.x.low, value)
            yield segment(self.left, y, self.right, y, "grid")
            yield text(self.left - 6, y + 4, tick_text(value), anchor="end")
        for value in self.x.ticks():
            x, _ = self.at(value, self.y.low)
            yield segment(x, self.bottom, x, self.bottom + 4, "grid")
            yield text(x, self.bottom + 18, tick_text(value), anchor="middle")
        yield segment(self.left, self.bottom, self.right, self.bottom, "base")
        yield text((self.left + self.right) / 2, self.height - 8, self.x.label, anchor="middle", kind="label")
        middle = (self.top + self.bottom) / 2
        turned = f'transform="rotate(-90 13 {middle:.1f})"'
        yield text(13, middle, self.y.label, anchor="middle", kind="label").replace("<text ", f"<text {turned} ", 1)


def circle(x: float, y: float, kind: str, title: str) -> str:
    """A point with its value on hover."""
    return f'<circle class="dot {kind}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{escape(title)}</title></circle>'


def tick_text(value: float) -> str:
    """A number beside an axis."""
    if value and not 1e-3 <= abs(value) < 1e5:  # noqa: PLR2004 - as few characters as there can be
        mantissa, power = f"{value:.0e}".split("e")
        factor = "" if mantissa == "1" else f"{mantissa}·"
        return f"{factor}10{raised(int(power))}"
    return f"{value:,.10g}".replace("-", "−")


def colour(i: int) -> str:
    """The class of the colour of the i-th series."""
    return f"c{i % COLOURS}"


def bars(rows: Sequence[tuple[str, float, str]], kind: str, said: str) -> str:
    """Horizontal bars on one scale that begins at 0: name, length, and what stands at its end."""
    if not rows:
        return ""
    names = min(max(text_width(name) for name, _, _ in rows) + 8, WIDTH / 2)
    ends = max(text_width(end) for _, _, end in rows) + 8
    top = max((value for _, value, _ in rows if math.isfinite(value)), default=0.0) or 1.0
    room, step = WIDTH - names - ends, 26
    parts = []
    for i, (name, value, end) in enumerate(rows):
        length = room * (value / top if math.isfinite(value) else 1.0)
        parts.append(text(names - 8, i * step + 18, fitted(name, names - 8), anchor="end"))
        parts.append(box(names, i * step + 5, length, 17, kind, f"{name}: {end}"))
        parts.append(text(names + length + 6, i * step + 18, end, kind="value"))
    return drawing(parts, WIDTH, len(rows) * step + 6, said)


def fitted(said: str, room: float) -> str:
    """A text, shortened at its beginning where it is wider than there is room."""
    letters = int(room / (GLYPH * FONT))
    return said if len(said) <= letters else f"…{said[-max(letters - 1, 1) :]}"
