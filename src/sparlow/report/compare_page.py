"""What a comparison leaves for people: ``compare.html``, figures, and tables for a paper (``.csv``, ``.tex``)."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparlow.files import replacing
from sparlow.machine import described
from sparlow.report.charts import task_chart
from sparlow.report.comparison import Comparison, Row
from sparlow.report.differences import Group, best, groups, mean_of_tasks, paired
from sparlow.report.headline import Tile
from sparlow.report.html_page import Part, page
from sparlow.report.perplexities import FLATTERS, shown, with_error
from sparlow.report.scatter import Mark, scatter
from sparlow.report.svg import COLOURS, Axis, Chart, Plot, as_file, colour, counted
from sparlow.report.wording import UNKNOWN, duration, model_name, number, percent, plain, short, size, words

KINDS = 8  # of layers that have a panel of their own
TASKS = 8  # methods whose tasks fit in one picture


def write_comparison(found: Comparison, folder: Path) -> list[Path]:
    """Write the page, the tables and the figures into ``folder``; return their paths."""
    texts = {"compare.html": html(found), "compare.csv": as_csv(found), "compare.tex": as_latex(found)}
    texts |= {f"{chart.name}.svg": as_file(chart.svg) for chart in charts(found)}
    for name, text in texts.items():
        with replacing(folder / name) as partial:
            partial.write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


def corpora(found: Comparison) -> list[str]:
    """The texts whose perplexities are shown."""
    return shown([found.dense.get("perplexity", {}), *(row.perplexity for row in found.rows)])


def html(found: Comparison) -> str:
    """The page of a comparison."""
    texts, some = corpora(found), groups(found.rows)
    in_domain = found.evaluation.get("in_domain", ())
    warnings = [f"{name} failed: {why}" for name, why in found.failed.items()]
    warnings += [f"{model_name(text)} is {FLATTERS.format('calibration')}." for text in texts if text in in_domain]
    what = "methods" if len(_series(found)) == len(_variants(found)) else "runs"
    return page(
        "comparison.html",
        f"{model_name(found.model)}: {len(some)} {what}",
        sentence=_sentence(found, texts),
        tiles=_tiles(found, texts),
        warnings=warnings,
        notes=[],
        charts=charts(found),
        methods=Part("Methods", *_table(found, texts)),
        pairs=[part for part in (*(_pairs(found.rows, text) for text in texts), _tasks(found)) if part.rows],
        details=[part for part in _details(found) if part.rows],
        footer=[
            f"Made with {', '.join(f'{name} {version}' for name, version in found.versions.items())}.",
            described(found.machine),
        ],
    )


def _sentence(found: Comparison, texts: Sequence[str]) -> str:
    if not (found.rows and texts):
        return f"{len(found.rows)} methods were compared; perplexity was not measured."
    first = best(found.rows, texts[0])
    if first is None:
        return f"Of {len(found.rows)} methods none has a finite perplexity on {model_name(texts[0])}."
    dense = found.dense.get("perplexity", {}).get(texts[0])
    than = (
        f", {percent(first.perplexity[texts[0]] / dense - 1, '+')} against the dense model's {number(dense)}"
        if dense
        else ""
    )
    return (
        f"{first.name} ends lowest on {model_name(texts[0])}: perplexity {number(first.perplexity[texts[0]])}{than}, "
        f"in {size(first.bytes)} and {duration(first.seconds)}."
    )


def _tiles(found: Comparison, texts: Sequence[str]) -> list[Tile]:
    if not found.rows:
        return []
    quickest = min(found.rows, key=lambda row: row.seconds)
    smallest = min(found.rows, key=lambda row: row.bytes)
    tiles = [
        Tile("Quickest", duration(quickest.seconds), quickest.name),
        Tile("Smallest file", size(smallest.bytes), f"{smallest.name}; dense {size(found.dense.get('bytes'))}"),
        Tile("Time of all", duration(sum(row.seconds for row in found.rows)), f"{len(found.rows)} runs"),
    ]
    first = best(found.rows, texts[0]) if texts else None
    if first is None:
        return tiles
    return [
        Tile("Lowest perplexity", number(first.perplexity[texts[0]]), f"{first.name}, on {model_name(texts[0])}"),
        *tiles,
    ]


def charts(found: Comparison) -> list[Chart]:
    """Perplexity against time and bytes for each text, the error of each kind of layer, tasks."""
    made: list[Chart] = []
    series = _series(found)
    key = tuple((colour(i), name) for name, i in series.items())
    some, texts = groups(found.rows), corpora(found)
    for i, text in enumerate(texts):
        dense = found.dense.get("perplexity", {}).get(text)
        more = f"_{i + 1}" if i else ""
        for what, label, log in (("time", "seconds of compression", True), ("bytes", "whole file, MB", False)):
            marks = _marks(some, series, text, what)
            title = f"Perplexity on {model_name(text)} against {what}"
            picture = scatter(marks, label, dense, title, log_x=log)
            about = "Lower and further left is better. The dotted line joins what no other method beats in both"
            about += "; arrows lead from a method to the same with matching." if any(mark.to for mark in marks) else "."
            made.append(Chart(f"perplexity_against_{what}{more}", title, about, picture, key))
    errors = _errors(found, series)
    scored = {row.name: row.tasks for row in found.rows if row.tasks}
    if scored:
        dense_tasks = {"dense": found.dense["tasks"]} if found.dense.get("tasks") else {}
        alone = len(series) == len(found.rows)  # else runs of one method need colours of their own
        colours = {row.name: series[row.series] for row in found.rows} | {"dense": len(series)} if alone else {}
        made.append(task_chart(dict([*dense_tasks.items(), *scored.items()][:TASKS]), colours))
    return [*made, *([errors] if errors else [])]


def _marks(some: Sequence[Group], series: Mapping[str, int], text: str, what: str) -> list[Mark]:
    by_name = {group.name: group for group in some}
    marks = []
    for group in some:
        first = group.rows[0]
        cost = sum(row.seconds for row in group.rows) / len(group.rows) if what == "time" else first.bytes / 1e6
        to = first.with_matching if first.with_matching in by_name else None
        marks.append(Mark(group.name, series[first.series], cost, group.mean(text), group.spread(text), to))
    return marks


def _series(found: Comparison) -> dict[str, int]:
    """The methods, each with the number of its colour."""
    return _numbered(row.series for row in found.rows)


def _variants(found: Comparison) -> dict[str, int]:
    """The runs, whatever their seeds and with or without matching, each with the number of its colour."""
    return _numbered(row.without_matching for row in found.rows)


def _numbered(names: Iterable[str]) -> dict[str, int]:
    return {name: i for i, name in enumerate(dict.fromkeys(names))}


def _errors(found: Comparison, series: Mapping[str, int]) -> Chart | None:
    """The mean relative error of each block, a line a run; colours tell runs apart while there are enough of them."""
    runs = _variants(found)
    apart = len(runs) <= COLOURS
    colours = runs if apart else series
    lines = {}
    for row in found.rows:
        blocks: dict[int, list[float]] = {}
        for block, _, error in row.layers:
            blocks.setdefault(block, []).append(error)
        lines[row.name] = [(block, sum(errors) / len(errors)) for block, errors in sorted(blocks.items())]
    points = [point for line in lines.values() for point in line]
    if not points:
        return None
    values = [value for _, value in points]
    plot = Plot(
        counted("block", (block for block, _ in points)), Axis.over(values, "mean relative squared error", log=True)
    )
    for row in found.rows:
        thin = "" if row.with_matching else "thin "
        own = colours[row.without_matching if apart else row.series]
        plot.line(lines[row.name], f"{thin}{colour(own)}", row.name)
    about = "The mean over the layers of each block, a line a run, thin with matching: tr(R H Rᵀ) / tr(W H Wᵀ)."
    key = tuple((colour(i), name) for name, i in colours.items())
    return Chart("relative_error", "Error against depth", about, plot.picture("Relative error against depth"), key)


def _table(found: Comparison, texts: Sequence[str]) -> tuple[Sequence[str], list[tuple[str, ...]]]:
    head = ["method", *(f"perplexity, {model_name(text)}" for text in texts)]
    head += ["mean relative squared error", "bits a parameter", "whole file", "time", "peak memory"]
    rows = []
    if found.dense:
        dense = (number(found.dense["perplexity"].get(text)) for text in texts)
        rows.append(("dense", *dense, "0", UNKNOWN, size(found.dense["bytes"]), UNKNOWN, UNKNOWN))
    for group in groups(found.rows):
        first, count = group.rows[0], len(group.rows)
        cells = (_over_seeds(group, text) for text in texts)
        error = sum(row.mean_relative_error for row in group.rows) / count
        cost = (
            duration(sum(row.seconds for row in group.rows) / count),
            size(max(row.peak_memory for row in group.rows)),
        )
        rows.append((group.name, *cells, short(error), number(first.bits_per_parameter), size(first.bytes), *cost))
    return head, rows


def _over_seeds(group: Group, text: str) -> str:
    spread = f" ± {number(group.spread(text))} ({len(group.rows)} seeds)" if len(group.rows) > 1 else ""
    return f"{number(group.mean(text))}{spread}"


def _pairs(rows: Sequence[Row], text: str) -> Part:
    """Every method beside the best one, over the same windows."""
    first = best(rows, text)
    found = []
    for row in rows if first else ():
        apart = paired(row.losses.get(text, ()), first.losses.get(text, ())) if first and row is not first else None
        if apart:
            known = row.agreement.get(text)
            dense = with_error(known.loss_difference, known.loss_difference_stderr, "+") if known else UNKNOWN
            found.append((row.name, with_error(apart.mean, apart.stderr, "+"), dense))
    than = f"than {first.name}" if first else ""
    about = "Differences of the mean loss over the same windows, in nats a token, with their standard errors."
    return Part(f"Worse {than}, on {model_name(text)}", ("method", than, "than the dense model"), found, about=about)


def task_table(found: Comparison) -> tuple[Sequence[str], list[tuple[str, ...]]]:
    """Tasks of the dense model and of every run, with their standard errors, and the means where there are several."""
    scored = {"dense": found.dense.get("tasks", {})} | {row.name: row.tasks for row in found.rows}
    scored = {name: tasks for name, tasks in scored.items() if tasks}
    metrics = {task: result["metric"] for tasks in scored.values() for task, result in tasks.items()}
    head = ["method", *(f"{task}, {metric}" for task, metric in metrics.items())]
    rows = []
    for name, tasks in scored.items():
        answered = (tasks.get(task) for task in metrics)
        rows.append((name, *(with_error(one["value"], one["stderr"]) if one else UNKNOWN for one in answered)))
    if len(metrics) > 1:
        head.append("mean")
        whole = {name: tasks if tasks.keys() == metrics.keys() else {} for name, tasks in scored.items()}
        rows = [(*cells, number(mean_of_tasks(whole[cells[0]]), 4)) for cells in rows]
    return head, rows


def _tasks(found: Comparison) -> Part:
    return Part("Tasks", *task_table(found), about="By lm-eval, with standard errors over the questions.")


def _details(found: Comparison) -> Iterable[Part]:
    yield Part("Every run", *_rows_as_read(found))
    yield Part("Recipe", ("field", "value"), [(words(name), plain(value)) for name, value in found.recipe.items()])
    yield Part("Evaluation", ("", ""), [(words(name), plain(value)) for name, value in found.evaluation.items()])
    yield Part("Machine", ("", ""), [(words(name), plain(value)) for name, value in found.machine.items()])


def _rows_as_read(found: Comparison) -> tuple[Sequence[str], list[tuple[str, ...]]]:
    records = list(records_of(found))
    head = list(dict.fromkeys(name for record in records for name in record))
    return [words(name) for name in head], [tuple(plain(record.get(name)) for name in head) for record in records]


def records_of(found: Comparison) -> Iterable[dict[str, Any]]:
    """A flat record a run, in full precision: the rows of ``compare.csv``."""
    texts = list(dict.fromkeys(name for row in found.rows for name in row.perplexity))
    firsts = {text: best(found.rows, text) for text in texts}
    for row in found.rows:
        record: dict[str, Any] = {"name": row.name, **row.about, "values": row.values}
        for text in texts:
            name, known, first = model_name(text), row.agreement.get(text), firsts[text]
            record[f"perplexity {name}"] = row.perplexity.get(text)
            record[f"loss above dense {name}"] = known.loss_difference if known else None
            record[f"its error {name}"] = known.loss_difference_stderr if known else None
            apart = paired(row.losses.get(text, ()), first.losses.get(text, ())) if first else None
            record[f"loss above best {name}"] = apart.mean if apart else None
            record[f"its error, best {name}"] = apart.stderr if apart else None
        for task, result in row.tasks.items():
            record |= {f"{task} {result['metric']}": result["value"], f"{task} stderr": result["stderr"]}
        record |= {name: getattr(row, name) for name in NUMBERS}
        yield record


NUMBERS = (
    *("mean_relative_error", "seconds", "bytes", "bits_per_weight", "bits_per_parameter", "share_compressed"),
    "peak_memory",
)


def as_csv(found: Comparison) -> str:
    """All rows in full precision, a line a run."""
    records = list(records_of(found))
    head = list(dict.fromkeys(name for record in records for name in record))
    text = io.StringIO()
    writer = csv.DictWriter(text, head, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def as_latex(found: Comparison) -> str:
    """The tables of the page, methods and tasks, for LaTeX with the package booktabs."""
    tables = [table for table in (_table(found, corpora(found)), task_table(found)) if table[1]]
    return "\n".join([f"% {found.model}", *(_tabular(*table) for table in tables)])


def _tabular(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}", r"\toprule"]
    lines += [" & ".join(map(_tex, head)) + r" \\", r"\midrule"]
    lines += [" & ".join(map(_tex, row)) + r" \\" for row in rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _tex(cell: str) -> str:
    special = {"\\": r"\textbackslash{}", "±": r"$\pm$", "–": "--", "−": "$-$", "~": r"\textasciitilde{}", "^": r"\^{}"}
    special |= {letter: f"\\{letter}" for letter in "&%$#_{}"}
    return "".join(special.get(letter, letter) for letter in cell)
