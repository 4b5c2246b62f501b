"""The figures of a comparison: perplexity against time, and the relative error of every layer by kind."""

import importlib.util
from pathlib import Path
from typing import Any

from sparlow.errors import InputError
from sparlow.files import replacing
from sparlow.report.comparison import Comparison
from sparlow.report.perplexities import FLATTERS, shown

PER_LINE = 4  # panels side by side
AS_IT_IS: Any = {"parse_math": False}  # names of files may hold $, between which matplotlib reads formulas
STYLE: Any = {"svg.hashsalt": "sparlow", "svg.fonttype": "none", "font.size": 9}  # the same figures give the same file


def require_matplotlib() -> None:
    """Raise InputError if matplotlib is missing, before a long run rather than after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("Figures need matplotlib. Run: pip install 'sparlow[plots]'")


def draw(found: Comparison, folder: Path) -> list[Path]:
    """Write ``perplexity_against_time.svg`` and ``relative_error.svg`` into ``folder``; return their paths."""
    from matplotlib import rc_context

    with rc_context(STYLE):
        figures = {"perplexity_against_time": _against_time(found), "relative_error": _errors(found)}
        for name, figure in figures.items():
            with replacing(folder / f"{name}.svg") as partial:
                figure.savefig(partial, format="svg", bbox_inches="tight", metadata={"Date": None})
    return [folder / f"{name}.svg" for name in figures]


def _against_time(found: Comparison) -> Any:  # noqa: ANN401 - matplotlib is imported where it is used
    from matplotlib.figure import Figure

    dense = found.dense.get("perplexity", {})
    corpora = shown([dense, *(row.perplexity for row in found.rows)])
    same, remark = found.evaluation.get("in_domain", ()), FLATTERS.format("calibration")
    figure = Figure(figsize=(5.5 * max(len(corpora), 1), 4))
    for panel, corpus in zip(figure.subplots(1, max(len(corpora), 1), squeeze=False)[0], corpora, strict=False):
        panel.axhline(dense[corpus], color="0.5", linestyle="--", linewidth=1)
        panel.annotate("dense", (1, dense[corpus]), xycoords=("axes fraction", "data"), ha="right", va="bottom")
        for i, row in enumerate(found.rows):
            panel.plot(row.seconds, row.perplexity[corpus], "o", color=f"C{i % 10}")
            point = (row.seconds, row.perplexity[corpus])
            panel.annotate(row.name, point, xytext=(4, 4), textcoords="offset points", **AS_IT_IS)
        panel.set(xscale="log", yscale="log", xlabel="seconds of compression", ylabel="perplexity")
        panel.set_title(f"{Path(corpus).name}\n{remark}" if corpus in same else Path(corpus).name, **AS_IT_IS)
    return figure


def _errors(found: Comparison) -> Any:  # noqa: ANN401 - matplotlib is imported where it is used
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(name for row in found.rows for _, name, _ in row.layers))
    lines = max(-(-len(kinds) // PER_LINE), 1)
    figure = Figure(figsize=(3.2 * PER_LINE, 2.6 * lines))
    panels = figure.subplots(lines, PER_LINE, squeeze=False, sharex=True).flatten()
    for panel, kind in zip(panels, kinds, strict=False):
        for i, row in enumerate(found.rows):
            points = [(block, error) for block, name, error in row.layers if name == kind]
            panel.plot(*zip(*points, strict=True), color=f"C{i % 10}", linewidth=1, label=row.name)
        panel.set(yscale="log")
        panel.set_title(kind, **AS_IT_IS)
    for panel in panels[len(kinds) :]:
        panel.set_axis_off()
    for panel in panels[::PER_LINE]:
        panel.set_ylabel("relative error")
    figure.supxlabel("block")
    if kinds:
        legend = figure.legend(*panels[0].get_legend_handles_labels(), loc="lower right", frameon=False)
        for text in legend.get_texts():
            text.set(**AS_IT_IS)
    figure.tight_layout()
    return figure
