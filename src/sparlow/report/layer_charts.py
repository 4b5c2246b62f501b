"""Charts of the layers of a run: where the error lies, how it grows with depth, how the worst solves settled."""

import re
from collections.abc import Iterable, Sequence
from statistics import fmean

from sparlow.report import svg
from sparlow.report.records import LayerRecord, Report
from sparlow.report.svg import Axis, Chart, Plot, colour, counted
from sparlow.report.wording import short

ROWS = 24  # of the heat map; where there are more, layers that differ in a number only share one
LINES = 7  # kinds of layers that have a line of their own
WORST = 6  # solves whose convergence is shown
SHADES = 5  # of the heat map's key
FAINTEST = 0.07  # of the heat map's colour
ERROR = "relative squared error"


def by_kind(layers: Sequence[LayerRecord]) -> dict[str, dict[int, list[LayerRecord]]]:
    """Layers by their name within the block and by block; names that differ in numbers only, where there are many."""
    together = len({layer.name for layer in layers}) > ROWS
    kinds: dict[str, dict[int, list[LayerRecord]]] = {}
    for layer in layers:
        name = re.sub(r"\b\d+\b", "*", layer.name) if together else layer.name
        kinds.setdefault(name, {}).setdefault(layer.block, []).append(layer)
    return kinds


def _mean(layers: Iterable[LayerRecord]) -> float:
    return fmean(layer.relative_error for layer in layers)


def heat_map(report: Report) -> Chart | None:
    """The relative error of every layer: a column a block, a row a kind of layer."""
    kinds = by_kind(report.layers)
    if not kinds:
        return None
    means = {(kind, block): _mean(some) for kind, blocks in kinds.items() for block, some in blocks.items()}
    scale = Axis.over(means.values(), ERROR, log=True, pad=0)
    blocks = range(min(block for _, block in means), max(block for _, block in means) + 1)
    names = min(max(map(svg.text_width, kinds)) + 10, 230)
    cell, high, top = min(max(860 / len(blocks), 5), 30), 24, 8
    parts = []
    for row, (kind, found) in enumerate(kinds.items()):
        y = top + row * high
        parts.append(svg.text(names - 8, y + 16, svg.fitted(kind, names - 8), anchor="end", kind="name"))
        for block, layers in found.items():
            value = means[kind, block]
            many = f" (mean of {len(layers)})" if len(layers) > 1 else ""
            said = f"block {block}, {kind}: {short(value)}{many}"
            place = names + (block - blocks.start) * cell
            parts.append(svg.box(place, y, cell, high, "heat cell", said, _shade(scale, value)))
    bottom = top + len(kinds) * high
    every = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if step * cell > 26)  # noqa: PLR2004 - two digits
    for block in (block for block in blocks if block % every == 0):
        place = names + (block - blocks.start + 0.5) * cell
        parts.append(svg.text(place, bottom + 16, str(block), anchor="middle"))
    width = names + max(len(blocks) * cell, 150)
    parts.append(svg.text(names, bottom + 36, "block", kind="label"))
    parts += _shades(scale, names, bottom + 48, width - names)
    picture = svg.drawing(parts, width + 6, bottom + 84, "Relative error by block and kind of layer", wide=True)
    about = "A column a block, a row a kind of layer; the stronger the colour, the more of the layer's output is lost."
    return Chart("relative_error", "Where the error lies", about, picture, wide=True)


def _shade(scale: Axis, value: float) -> str:
    share = scale.share(value) if scale.shows(value) and scale.high > scale.low else 0.0
    return f' fill-opacity="{FAINTEST + (1 - FAINTEST) * min(max(share, 0), 1):.2f}"'


def _shades(scale: Axis, x: float, y: float, room: float) -> list[str]:
    """The key of the heat map: shades with their values."""
    width = min(room / SHADES, 84)
    parts = []
    for i in range(SHADES):
        value = scale.low * (scale.high / scale.low) ** (i / (SHADES - 1))
        parts.append(svg.box(x + i * width, y, width, 12, "heat cell", short(value), _shade(scale, value)))
        parts.append(svg.text(x + (i + 0.5) * width, y + 27, short(value), anchor="middle"))
    return parts


def depth(report: Report) -> Chart | None:
    """The relative error against the number of the block: the mean, and the largest kinds of layers."""
    if not report.layers:
        return None
    kinds = by_kind(report.layers)
    blocks = sorted({layer.block for layer in report.layers})
    mean = [(block, fmean(row.relative_error for row in report.layers if row.block == block)) for block in blocks]
    lines = {kind: [(block, _mean(some)) for block, some in found.items()] for kind, found in kinds.items()}
    lines = lines if len(lines) <= LINES else {}
    values = [value for line in (mean, *lines.values()) for _, value in line]
    plot = Plot(counted("block", blocks), Axis.over(values, ERROR, log=True))
    for i, (kind, line) in enumerate(lines.items()):
        plot.line(line, f"thin {colour(i)}", kind)
    plot.line(mean, "thick all", "mean of the block")
    key = (("all", "mean"), *((colour(i), kind) for i, kind in enumerate(lines)))
    picture = plot.picture("Relative error against depth")
    return Chart("depth", "Error against depth", "The mean of each block, and each kind of layer.", picture, key)


def convergence(report: Report) -> Chart | None:
    """How the solves of the layers with the largest errors settled."""
    traced = [layer for layer in report.layers if len(layer.trace) > 1]
    worst = sorted(traced, key=lambda layer: -layer.relative_error)[:WORST]
    if not worst:
        return None
    steps = [step for layer in worst for step, _ in layer.trace]
    changes = [change for layer in worst for _, change in layer.trace]
    plot = Plot(Axis.over(steps, "iterations", pad=0.02), Axis.over(changes, "share of entries that changed", log=True))
    for i, layer in enumerate(worst):
        said = f"block {layer.block}, {layer.name}: {ERROR} {short(layer.relative_error)}"
        plot.line(layer.trace, colour(i), said)
    key = tuple((colour(i), f"{layer.block} · {layer.name}") for i, layer in enumerate(worst))
    about = "The layers with the largest errors: which share of the kept entries changed since the last look."
    return Chart("convergence", "Convergence of the worst solves", about, plot.picture("Convergence"), key)
