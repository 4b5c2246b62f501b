"""One self-contained HTML page for a report: no script, no file beside it, everything shown is escaped."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from sparlow.files import human_bytes, replacing
from sparlow.machine import described
from sparlow.report.perplexities import agreement_rows, labelled, shown
from sparlow.report.records import LayerRecord, Report
from sparlow.report.value_types import MODEL

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2530; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; width: 100% } th, td { padding: .25rem .6rem; border-bottom: 1px solid #dde3ea }
th { text-align: left; font-weight: 600 } td.number, th.number { text-align: right; font-variant-numeric: tabular-nums }
.warning { background: #fff6e0; padding: .2rem .6rem; border-left: 3px solid #e0a100; margin: .3rem 0 }
.bar { fill: #2f6db3 } .axis { font-size: 11px; fill: #5a6673 } footer { color: #5a6673; margin-top: 2rem }
"""


def write_reports(report: Report, folder: Path) -> None:
    """Write ``report.json`` and ``report.html`` into ``folder``, each whole or not at all."""
    for name, text in (("report.json", report.to_json()), ("report.html", html(report))):
        with replacing(folder / name) as partial:
            partial.write_text(text, encoding="utf-8")


def html(report: Report) -> str:
    """The whole page."""
    recipe = report.recipe
    patterns = dict.fromkeys(layer.pattern for layer in report.layers)
    pattern = next(iter(patterns)) if len(patterns) == 1 else "mixed patterns"
    title = f"{report.model}: {recipe['algorithm']}, {pattern}, {report.value_types} values"
    parts = [
        f"<h1>{escape(title)}</h1>",
        _table(summary_head(report), summary_rows(report)),
        f"<p>{escape(remarks(report))}</p>",
        *(f"<p>{escape(note)}</p>" for note in report.notes),
        *(f'<p class="warning">{escape(warning)}</p>' for warning in report.warnings),
        *_finetuning(report),
        "<h2>Relative error by layer</h2>",
        *(_bars(name, rows) for name, rows in _by_kind(report.layers).items()),
        "<h2>Layers</h2>",
        _table(_LAYER_HEAD, (_layer_row(layer) for layer in report.layers)),
        "<h2>Not compressed</h2>",
        _table(("module", "parameters", "why", "stored in", "trained"), map(_skipped_row, report.not_compressed)),
        "<h2>Recipe</h2>",
        _table(("field", "value"), ((name, _text(value)) for name, value in recipe.items())),
        "<h2>Seconds</h2>",
        _table(("part", "seconds"), ((name, f"{value:.1f}") for name, value in report.seconds.items())),
        f"<footer>{escape(', '.join(f'{k} {v}' for k, v in report.versions.items()))}</footer>",
        f"<footer>{escape(described(report.machine))}</footer>",
    ]
    body = "\n".join(parts)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>{body}</body></html>\n"
    )


def _finetuning(report: Report) -> list[str]:
    """What fine-tuning did, if anything."""
    if not report.finetuning:
        return []
    apart = ("loss", "perplexity", "versions", "machine")
    shown = {name: value for name, value in report.finetuning.items() if name not in apart}
    shown |= {"first loss": report.finetuning["loss"][0], "last loss": report.finetuning["loss"][-1]}
    return [
        "<h2>Fine-tuning</h2>",
        _table(("", "before", "after"), perplexities_of_finetuning(report)),
        _table(("field", "value"), ((name, _text(value)) for name, value in shown.items())),
    ]


def perplexities_of_finetuning(report: Report) -> list[tuple[str, str, str]]:
    """A row a corpus: name, before, after."""
    before, after = (report.finetuning["perplexity"][when] for when in ("before", "after"))
    same = report.finetuning.get("in_domain", ())
    return [
        (labelled(name, same, "training or calibration"), _perplexity(before[name]), _perplexity(after[name]))
        for name in shown([before, after])
    ]


def summary_head(report: Report) -> tuple[str, str, str]:
    """The titles of ``summary_rows``."""
    return "", "dense", "fine-tuned" if report.finetuning else "compressed"


def summary_rows(report: Report) -> list[tuple[str, str, str]]:
    """What the terminal and the page both show first: name, dense, and what the result is now."""
    dense = report.dense["perplexity"]
    now = report.finetuning["perplexity"]["after"] if report.finetuning else report.compressed["perplexity"]
    same = report.finetuning.get("in_domain", ()) if report.finetuning else report.in_domain
    rows = []
    for name in shown([dense, now]):
        rows.append((labelled(name, same), _perplexity(dense.get(name)), _perplexity(now.get(name))))
        if name in report.agreement and not report.finetuning:  # which it was measured before
            rows += [(what, "–", value) for what, value in agreement_rows(name, report.agreement[name])]
    sizes = report.bytes
    values = report.values
    rows.append(("values kept", f"{values['linears_dense']:,}", f"{values['linears_compressed']:,}"))
    rows.append(("type of these values", MODEL, report.value_types))
    rows.append(("linear layers", human_bytes(sizes["linears_dense"]), human_bytes(sizes["linears_compressed"])))
    rows.append(("whole model", human_bytes(sizes["dense"]), human_bytes(sizes["compressed"])))
    dense_bits = report.bits_per_weight * sizes["linears_dense"] / max(sizes["linears_compressed"], 1)
    rows.append(("bits a linear weight", f"{dense_bits:.2f}", f"{report.bits_per_weight:.2f}"))
    if report.parameters:
        whole = 8 * sizes["dense"] / report.parameters["model"]
        rows.append(("bits a parameter, whole file", f"{whole:.2f}", f"{report.bits_per_parameter:.2f}"))
        rows.append(("parameters of the blocks that are compressed", "–", f"{report.share_compressed:.1%}"))
    when = " before fine-tuning" if report.finetuning else ""
    rows.append((f"mean relative error{when}", "0", f"{report.mean_relative_error:.5f}"))
    per_token = report.mean_relative_error_per_token
    if per_token is not None:
        rows.append(("the same, each token by its own size", "0", f"{per_token:.5f}"))
    return rows


def remarks(report: Report) -> str:
    """Return one sentence on how many layers need a remark, and which."""
    said = {
        "extra_damping": "needed extra damping",
        "dead_inputs": "had dead inputs",
        "unsettled": "had not settled when the solver ended",
        "without_data": "saw no calibration token",
    }
    parts = [f"{report.counts[name]} {what}" for name, what in said.items() if report.counts.get(name)]
    return f"Of {len(report.layers)} layers {', '.join(parts) or 'none needs a remark'}."


def _perplexity(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


_LAYER_HEAD = (
    "block",
    "layer",
    "shape",
    "pattern",
    "density",
    "values",
    "rank",
    "relative error",
    "each token by its size",
    "iterations",
    "seconds",
)


def _layer_row(layer: LayerRecord) -> tuple[str, ...]:
    shape = f"{layer.shape[0]} × {layer.shape[1]}"
    per_token = "–" if layer.relative_error_per_token is None else f"{layer.relative_error_per_token:.5f}"
    numbers = (f"{layer.relative_error:.5f}", per_token, str(layer.iterations), f"{layer.seconds:.1f}")
    kept = (layer.pattern, f"{layer.density:.4f}", layer.shown_values, str(layer.rank))
    return (str(layer.block), layer.name, shape, *kept, *numbers)


def _skipped_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    cells = (_text(row[name]) for name in ("name", "parameters", "why"))
    return (*cells, str(row.get("stored", MODEL)), "yes" if row.get("trained") else "no")


def _by_kind(layers: Sequence[LayerRecord]) -> dict[str, list[LayerRecord]]:
    kinds: dict[str, list[LayerRecord]] = {}
    for layer in layers:
        kinds.setdefault(layer.name, []).append(layer)
    return kinds


def _bars(name: str, layers: Sequence[LayerRecord]) -> str:
    """Return a small bar chart with a bar for each block, scaled to the largest."""
    width, height, top = 16, 70, max(layer.relative_error for layer in layers) or 1.0
    bars = "".join(
        f'<rect class="bar" x="{i * width}" y="{height * (1 - layer.relative_error / top):.1f}" width="{width - 3}" '
        f'height="{height * layer.relative_error / top:.1f}">'
        f"<title>block {layer.block}: {layer.relative_error:.5f}</title></rect>"
        for i, layer in enumerate(layers)
    )
    label = f'<text class="axis" x="0" y="{height + 14}">{escape(name)}, at most {top:.5f}</text>'
    return f'<svg width="{max(len(layers) * width, 260)}" height="{height + 20}" role="img">{bars}{label}</svg>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    top = "".join(f"<th{_align(i)}>{escape(cell)}</th>" for i, cell in enumerate(head))
    body = "".join(
        "<tr>" + "".join(f"<td{_align(i)}>{escape(cell)}</td>" for i, cell in enumerate(row)) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _align(column: int) -> str:
    return ' class="number"' if column else ""


def _text(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
