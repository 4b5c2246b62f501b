"""The page of ``sparlow benchmark``, from what its ``to_dict`` gives: speed and memory, model beside model."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sparlow.machine import described
from sparlow.report import svg
from sparlow.report.headline import Tile
from sparlow.report.html_page import Part, page
from sparlow.report.svg import Chart, colour
from sparlow.report.wording import UNKNOWN, duration, model_name, number, percent, plain, short, size, words

PARTS = ("model", "mode", "dtype", "inputs", "step")  # of the name of a row, those that differ


def html(found: Mapping[str, Any]) -> str:
    """The page.

    Args:
        found: What ``sparlow benchmark --json`` writes.
    """
    rows, names = found["rows"], names_of(found["rows"])
    wrong = [name for row, name in zip(rows, names, strict=True) if not row["same_output"]]
    return page(
        "benchmark.html",
        f"Speed of {_models(rows)}",
        sentence=_sentence(rows, names),
        tiles=_tiles(found, names),
        warnings=[
            f"{name} computes something else than its weights in float32, so its speed means nothing." for name in wrong
        ],
        notes=found["notes"],
        charts=charts(found),
        measured=_table(rows, names),
        details=[part for part in _details(found) if part.rows],
        footer=[
            f"Made with {', '.join(f'{name} {version}' for name, version in found['versions'].items())}.",
            described(found["machine"]),
        ],
    )


def names_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What tells the rows apart: model, mode, type and step, without those that are the same in all."""
    shown = [{**row, "model": model_name(row["model"])} for row in rows]
    different = [part for part in PARTS if len({row[part] for row in shown}) > 1] or ["model"]
    return [", ".join(row[part] for part in different) for row in shown]


def _models(rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(model_name(row["model"]) for row in rows))
    return names[0] if len(names) == 1 else f"{len(names)} models"


def _batch(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The number of texts at once that the top of the page tells of: the fewest."""
    return min((batch for row in rows for batch in row["median"]["decode"]), key=int, default=None)


def _sentence(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    batch = _batch(rows)
    if batch is None:
        return "Nothing was measured."
    rates = [(row["median"]["decode"][batch], name, row) for row, name in zip(rows, names, strict=True)]
    rate, name, row = max(rates, key=lambda one: one[0])
    times = row["times_dense"].get(batch)
    than = f", {number(times)} times the fastest dense model" if times and row["compressed"] else ""
    return f"{name} is the fastest: {number(rate, 1)} tokens a second{than}."


def _tiles(found: Mapping[str, Any], names: Sequence[str]) -> list[Tile]:
    rows, batch = found["rows"], _batch(found["rows"])
    if batch is None:
        return []
    named = list(zip(rows, names, strict=True))
    fastest, of_fastest = max(named, key=lambda one: one[0]["median"]["decode"][batch])
    first, of_first = min(named, key=lambda one: one[0]["median"]["first"][batch])
    least, of_least = min(named, key=lambda one: _peak(one[0], batch))
    few, of_few = min(named, key=lambda one: one[0]["bytes_read"])
    return [
        Tile("Tokens a second", number(fastest["median"]["decode"][batch], 1), of_fastest),
        Tile("To the first token", duration(first["median"]["first"][batch]), of_first),
        Tile("Least memory", size(_peak(least, batch)), of_least),
        Tile("Fewest bytes a token", size(few["bytes_read"]), of_few),
    ]


def _peak(row: Mapping[str, Any], batch: str) -> int:
    """The peak of memory; its keys are numbers before they were written as JSON, and texts behind it."""
    return int({str(key): value for key, value in row["peak"].items()}.get(batch, 0))


def charts(found: Mapping[str, Any]) -> list[Chart]:
    """Tokens a second and time to the first token by number of texts, then memory and bytes read."""
    rows, names = found["rows"], names_of(found["rows"])
    made = []
    for batch in dict.fromkeys(batch for row in rows for batch in row["median"]["decode"]):
        texts = "one text" if batch == "1" else f"{batch} texts at once"
        speed = [_bar(row, name, "decode", batch, "") for row, name in zip(rows, names, strict=True)]
        prompts = [_bar(row, name, "prefill", batch, "") for row, name in zip(rows, names, strict=True)]
        made += [
            _chart(f"decode_{batch}", f"Tokens a second, {texts}", "Behind the first token of each text.", speed, 0),
            _chart(f"prefill_{batch}", f"Prompt tokens a second, {texts}", "Read before the first token.", prompts, 3),
        ]
    batch = _batch(rows)
    if batch is not None:
        peaks = [
            (name, float(_peak(row, batch)), size(_peak(row, batch))) for row, name in zip(rows, names, strict=True)
        ]
        reads = [
            (name, float(row["bytes_read"]), size(row["bytes_read"])) for row, name in zip(rows, names, strict=True)
        ]
        about = "The highest of a whole generation, Python and its libraries included."
        made.append(_chart("memory", "Memory", about, peaks, 2))
        made.append(_chart("bytes", "Weights that a token reads", "What bounds the speed of a single text.", reads, 6))
    return made


def _bar(row: Mapping[str, Any], name: str, what: str, batch: str, unit: str) -> tuple[str, float, str]:
    """A rate with half of what lies between the slowest run and the fastest."""
    median = row["median"][what][batch]
    runs = {str(key): values for key, values in row[what].items()}.get(batch, [median])
    spread = (max(runs) - min(runs)) / 2 / median if median else 0.0
    times = row["times_dense"].get(batch) if what == "decode" else None
    more = f", {number(times)}×" if times else ""
    return name, float(median), f"{short(median)}{unit} ± {percent(spread)}{more}"


def _chart(name: str, title: str, about: str, rows: Sequence[tuple[str, float, str]], series: int) -> Chart:
    return Chart(name, title, about, svg.bars(rows, f"bar {colour(series)}", title))


def _table(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Part:
    head = ("", "texts", "prompt tokens/s", "to first token", "tokens/s", "of dense", "peak memory", "same output")
    lines = [
        (
            name,
            batch,
            short(row["median"]["prefill"][batch]),
            duration(row["median"]["first"][batch]),
            number(rate, 1),
            f"{number(row['times_dense'][batch])} ×" if row["times_dense"].get(batch) else UNKNOWN,
            size(_peak(row, batch)),
            f"{'yes' if row['same_output'] else 'NO'} ({short(row['difference'])})",
        )
        for row, name in zip(rows, names, strict=True)
        for batch, rate in row["median"]["decode"].items()
    ]
    return Part("Measured", head, lines)


def _details(found: Mapping[str, Any]) -> Iterable[Part]:
    about = [
        (model_name(row["model"]), *(row[part] for part in PARTS[1:]), size(row["bytes_read"])) for row in found["rows"]
    ]
    yield Part("Rows", (*PARTS, "reads a token"), about, left=4)
    settings = {name: value for name, value in found["settings"].items() if name != "models"}
    yield Part("Options", ("option", "value"), [(words(name), plain(value)) for name, value in settings.items()])
    yield Part("Machine", ("", ""), [(words(name), plain(value)) for name, value in found["machine"].items()])
