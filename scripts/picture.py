"""The picture of the README, from the figures that are committed: perplexity against the bytes of the whole file.

    python scripts/picture.py    writes docs/perplexity_against_bytes.svg

It needs nothing but Python, and reads benchmarks/results/frontier/frontier.json (``benchmarks/frontier.py`` prints it)
and benchmarks/results/comparison/16to32.json (``sparlow compare``, docs/results.md).
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FRONTIER = ROOT / "benchmarks/results/frontier/frontier.json"
ZEROS = ROOT / "benchmarks/results/comparison/16to32.json"
PICTURE = ROOT / "docs/perplexity_against_bytes.svg"

WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 40, 52  # margins
MEGABYTES = (56, 300)
PERPLEXITY = (22, 72)
X_TICKS, Y_TICKS = (60, 75, 90, 110, 140, 180, 230, 269), (25, 30, 40, 50, 60, 70)
SERIES = {  # kind of a row: what the legend calls it, and its colour
    "sparlow": ("sparlow, one shot", "#1f77b4"),
    "GPTQ": ("GPTQ, by sparlow", "#8e6bbf"),
    "llama.cpp": ("llama.cpp", "#d9661f"),
    "rounded to nearest": ("rounded to the nearest", "#8a8f98"),
    "dense": ("dense, 16 bits", "#2b9a4b"),
}
STYLE = """
text { font: 12px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #24292f }
.axis { stroke: #57606a } .grid { stroke: #d0d7de; stroke-width: .6 } .note { fill: #57606a }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .axis { stroke: #8b949e } .grid { stroke: #30363d } .note { fill: #8b949e }
}"""


@dataclass(frozen=True)
class Point:
    """One model: what it is, its bytes, its perplexity, and where its label stands (offset, anchor)."""

    label: str
    kind: str
    megabytes: float
    perplexity: float
    at: tuple[int, int, str] = (9, 4, "start")


LABELS = {  # a row of frontier.json: its label, and where it stands; matched rows are another comparison and stay out
    "3basil, dense, int2, rank 16": ("2.5 bits", (9, 4, "start")),
    "sparsegpt, dense, int3, rank 0": ("GPTQ, 3.1 bits", (9, 4, "start")),
    "3basil, 16:32, int4, rank 16": ("16:32 in int4", (0, -10, "middle")),
    "3basil, dense, int3, rank 16": ("3.5 bits", (-9, 4, "end")),
    "3basil, dense, int4, rank 0": ("4.1 bits, no U V", (-9, 4, "end")),
    "3basil, dense, int4, rank 16": ("4.5 bits", (-9, 4, "end")),
    "3basil, --bits 9.74": ("13:32 in 16 bits", (9, 8, "start")),
    "3basil, --bits 5.4": ("5.4 bits", (0, 20, "middle")),
    "int4": ("int4", (9, 4, "start")),
    "Q2_K": ("Q2_K", (9, 4, "start")),
    "Q4_0": ("Q4_0", (9, 4, "start")),
    "Q4_K_M": ("Q4_K_M", (9, -4, "start")),
    "dense": ("dense", (0, -10, "middle")),
}


def points() -> tuple[list[Point], dict[str, float]]:
    """What is drawn, and what lies above the picture: name and perplexity."""
    rows = json.loads(FRONTIER.read_text("utf-8"))["rows"]
    found, above = [], {}
    for row in rows:
        if row.get("matched"):
            continue
        if row["perplexity"] > PERPLEXITY[1]:
            above[row["name"]] = row["perplexity"]
            continue
        label, at = LABELS[row["name"]]
        kind = "GPTQ" if row["name"].startswith("sparsegpt") else row["kind"]
        found.append(Point(f"{label}: {row['perplexity']:.1f}", kind, row["bytes"] / 1e6, row["perplexity"], at))
    megabytes, perplexity = zeros()
    label = f"16:32 + rank 16 in 16 bits: {perplexity:.1f}"
    found.append(Point(label, "sparlow", megabytes, perplexity, (-9, 4, "end")))
    return found, above


def x_of(megabytes: float) -> float:
    """Pixels from the left; logarithmic."""
    share = math.log(megabytes / MEGABYTES[0]) / math.log(MEGABYTES[1] / MEGABYTES[0])
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def y_of(perplexity: float) -> float:
    """Pixels from the top; logarithmic."""
    share = math.log(perplexity / PERPLEXITY[0]) / math.log(PERPLEXITY[1] / PERPLEXITY[0])
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def zeros() -> tuple[float, float]:
    """Megabytes and perplexity of 16:32 + rank 16 with values in 16 bits."""
    rows = json.loads(ZEROS.read_text("utf-8"))["rows"]
    (row,) = [row for row in rows if row["name"] == "3basil"]
    (perplexity,) = row["perplexity"].values()
    return row["bytes"] / 1e6, perplexity


def axes() -> list[str]:
    """Grid, ticks and what the axes are."""
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    lines = []
    for value in X_TICKS:
        x = f"{x_of(value):.1f}"
        lines.append(f'<line class="grid" x1="{x}" y1="{TOP}" x2="{x}" y2="{bottom}"/>')
        lines.append(f'<text class="note" x="{x}" y="{bottom + 18}" text-anchor="middle">{value}</text>')
    for value in Y_TICKS:
        y = f"{y_of(value):.1f}"
        lines.append(f'<line class="grid" x1="{LEFT}" y1="{y}" x2="{right}" y2="{y}"/>')
        lines.append(f'<text class="note" x="{LEFT - 8}" y="{y}" dy="4" text-anchor="end">{value}</text>')
    middle = (LEFT + right) / 2
    lines.append(f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{right}" fill="none"/>')
    lines.append(f'<text x="{middle}" y="{HEIGHT - 10}" text-anchor="middle">MB of the whole file (logarithmic)</text>')
    lines.append(
        f'<text transform="translate(14 {(TOP + bottom) / 2}) rotate(-90)" text-anchor="middle">perplexity</text>'
    )
    return lines


def legend() -> list[str]:
    """One colour a kind of row, in a line above."""
    lines, x = [], LEFT
    for name, colour in SERIES.values():
        lines.append(f'<circle cx="{x + 5}" cy="18" r="5" fill="{colour}"/><text x="{x + 15}" y="22">{name}</text>')
        x += 34 + round(6.2 * len(name))
    return lines


def picture() -> str:
    """The whole SVG."""
    found, above = points()
    spots = [*axes(), *legend()]
    for point in found:
        x, y = x_of(point.megabytes), y_of(point.perplexity)
        right, down, anchor = point.at
        spots.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{SERIES[point.kind][1]}"/>')
        spots.append(f'<text x="{x + right:.1f}" y="{y + down:.1f}" text-anchor="{anchor}">{point.label}</text>')
    said = "; ".join(f"{name} rounded to the nearest: {value:.0f}" for name, value in above.items())
    note = f"above the picture: {said}"
    spots.append(f'<text class="note" x="{WIDTH - RIGHT - 6}" y="{TOP + 16}" text-anchor="end">{note}</text>')
    title = "SmolLM2-135M: WikiText-2 perplexity against the bytes of the whole file"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">'
    return "\n".join([head, f"<title>{title}</title><style>{STYLE}</style>", *spots, "</svg>", ""])


def main() -> None:
    """Write the picture."""
    PICTURE.write_text(picture(), "utf-8")
    print(f"written to {PICTURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
