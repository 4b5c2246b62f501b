"""The charts of a run, from its report. Each function gives a picture and the names of its colours, or nothing."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from types import MappingProxyType
from typing import Any

from sparlow.report import svg
from sparlow.report.layer_charts import convergence, depth, heat_map
from sparlow.report.records import Report
from sparlow.report.svg import Axis, Chart, Plot, colour, counted
from sparlow.report.wording import duration, number, percent, short, size, words

NO_COLOURS: Mapping[str, int] = MappingProxyType({})


def charts_of_run(report: Report) -> list[Chart]:
    """All charts that a report has the figures for."""
    found = (steps(report), heat_map(report), depth(report), convergence(report), losses(report), tasks(report))
    return [chart for chart in (*found, time(report), memory(report)) if chart]


def losses(report: Report) -> Chart | None:
    """The loss of matching after each epoch: of all blocks together, or of each by itself relative to its first."""
    together = report.distillation
    rows = [together] if together else report.matching
    curves = [_curve(row) for row in rows]
    curves = [curve if together else _relative(curve) for curve in curves]
    curves = [curve for curve in curves if len(curve) > 1]
    if not curves:
        return None
    label = "divergence, nats a token" if together else "loss, share of the first"
    plot = Plot(
        counted("epoch", range(max(map(len, curves)))),
        Axis.over((value for curve in curves for value in curve), label, log=True),
    )
    for row, curve in zip(rows, curves, strict=False):
        name = "all blocks" if together else f"block {row['block']}"
        said = f"{name}: {short(row['loss_before'])} → {short(row['loss_after'])}"
        plot.line([*enumerate(curve)], colour(0) if together else f"thin {colour(row['block'])}", said)
    about = "All blocks were trained together towards the dense model." if together else "A line a block."
    return Chart("matching", "Matching loss", f"{about} The best epoch is kept.", plot.picture("Matching loss"))


def _curve(row: Mapping[str, Any]) -> list[float]:
    """The loss before, and after each epoch; of an older version only before and after."""
    return [row["loss_before"], *(row.get("losses") or [row["loss_after"]])]


def _relative(curve: Sequence[float]) -> list[float]:
    return [value / curve[0] for value in curve] if curve[0] else []


def steps(report: Report) -> Chart | None:
    """The loss of every step of fine-tuning."""
    found = report.finetuning.get("loss", [])
    if not found:
        return None
    plot = Plot(counted("step", range(1, len(found) + 1)), Axis.over(found, "loss, nats a token"))
    smooth = [fmean(found[max(0, i - 9) : i + 1]) for i in range(len(found))]
    plot.line([*enumerate(found, 1)], f"thin {colour(7)}", "each step")
    plot.line([*enumerate(smooth, 1)], f"thick {colour(0)}", "mean of the last ten steps")
    key = ((colour(7), "each step"), (colour(0), "mean of the last ten"))
    return Chart("loss", "Fine-tuning loss", "On the training text.", plot.picture("Fine-tuning loss"), key)


def tasks(report: Report) -> Chart | None:
    """Tasks with their standard errors, the dense model's beside the compressed one's."""
    now = report.compressed.get("tasks", {})
    if not now:
        return None
    before = report.dense.get("tasks", {})
    return task_chart({"dense": before, "compressed": now})


def task_chart(models: Mapping[str, Mapping[str, Mapping[str, Any]]], colours: Mapping[str, int] = NO_COLOURS) -> Chart:
    """Tasks of several models: a row a task, a dot with its error a model.

    Args:
        models: Results by the name of the model, then by that of the task.
        colours: Numbers of colours by the name of the model, as other pictures have them; in their order if left out.
    """
    chosen = [colours.get(model, i) for i, model in enumerate(models)]
    names = list(dict.fromkeys(name for found in models.values() for name in found))
    room = min(max(map(svg.text_width, names)) + 10, svg.WIDTH / 2)
    high = 14 * max(len(models), 1) + 10
    right, parts, bottom = svg.WIDTH - 16, list[str](), len(names) * high + 6
    axis = Axis("score", 0.0, 1.0)
    for value in axis.ticks():
        x = room + axis.share(value) * (right - room)
        parts += [svg.segment(x, 4, x, bottom, "grid"), svg.text(x, bottom + 16, svg.tick_text(value), anchor="middle")]
    for row, name in enumerate(names):
        parts.append(svg.text(room - 8, row * high + high / 2 + 6, svg.fitted(name, room), anchor="end", kind="name"))
        for i, (model, found) in enumerate(models.items()):
            if name in found:
                y = row * high + 14 * i + 16
                parts += _with_bar(axis, room, right, y, found[name], chosen[i], f"{name}, {model}")
    parts.append(svg.text((room + right) / 2, bottom + 36, "score, with its standard error", anchor="middle"))
    picture = svg.drawing(parts, svg.WIDTH, bottom + 46, "Tasks with error bars")
    key = tuple((colour(i), model) for i, model in zip(chosen, models, strict=True))
    return Chart("tasks", "Tasks", "Zero-shot or few-shot tasks by lm-eval; bars are standard errors.", picture, key)


def _with_bar(
    axis: Axis, left: float, right: float, y: float, result: Mapping[str, Any], i: int, said: str
) -> list[str]:
    value, error = float(result["value"]), result.get("stderr")
    ends = [left + min(max(axis.share(value + d * (error or 0)), 0), 1) * (right - left) for d in (-1, 0, 1)]
    title = f"{said}: {number(value, 3)}" + (f" ± {number(error, 3)}" if error else "")
    bar = [svg.segment(ends[0], y, ends[2], y, f"error {colour(i)}")] if error else []
    return [*bar, svg.circle(ends[1], y, colour(i), title)]


PARTS = {
    "solve": "solving",
    "statistics": "dense pass, statistics",
    "walk": "compressed pass",
    "matching": "matching",
    "save": "writing",
    "evaluate": "evaluating",
}


def time(report: Report) -> Chart | None:
    """Where the time went."""
    total = report.seconds.get("total", 0.0)
    spent = {PARTS.get(name, words(name)): value for name, value in report.seconds.items() if name != "total"}
    rest = total - sum(spent.values())
    if rest > 0.01 * total:
        spent["the rest"] = rest
    rows = [
        (name, value, f"{duration(value)}, {percent(value / total)}")
        for name, value in spent.items()
        if value and total
    ]
    if not rows:
        return None
    rows.sort(key=lambda row: -row[1])
    picture = svg.bars(rows, f"bar {colour(0)}", "Where the time went")
    return Chart("time", "Where the time went", f"{duration(total)} in all.", picture)


def memory(report: Report) -> Chart | None:
    """Memory and files, on one scale."""
    sizes = {
        "most memory taken": report.peak_memory.get("rss", 0),
        "most on the accelerator": report.peak_memory.get("device", 0),
        "file, dense": report.bytes.get("dense", 0),
        "file, compressed": report.bytes.get("compressed", 0),
    }
    rows = [(name, float(value), size(value)) for name, value in sizes.items() if value]
    if not rows:
        return None
    picture = svg.bars(rows, f"bar {colour(2)}", "Memory and files")
    return Chart("memory", "Memory and files", "The highest of the whole run, beside the models as files.", picture)
