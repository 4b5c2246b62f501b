"""Pages as one self-contained file each: no network, everything shown is escaped, whole without its script."""

import base64
import hashlib
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparlow.files import replacing
from sparlow.machine import described
from sparlow.report.charts import charts_of_run
from sparlow.report.expert_rows import HEAD as EXPERTS
from sparlow.report.expert_rows import expert_rows
from sparlow.report.headline import corpus_on_top, form, sentence, tiles
from sparlow.report.layer_charts import by_kind
from sparlow.report.layer_rows import HEAD, layer_rows
from sparlow.report.records import LayerRecord, Report
from sparlow.report.summary import perplexities_of_finetuning, remarks, summary_head, summary_rows
from sparlow.report.value_types import MODEL
from sparlow.report.wording import UNKNOWN, day, duration, model_name, plain, short, words

if TYPE_CHECKING:
    from jinja2 import Environment

SHOWN_WARNINGS = 6  # the rest is folded
PROMPT = "The capital of France is"  # of the command to copy
NO_FOLDER = "DIRECTORY"  # where a page does not know its own


@dataclass(frozen=True)
class Part:
    """A folded table; the columns from ``left`` on are numbers."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1
    about: str = ""


@dataclass(frozen=True)
class Command:
    """Something to copy."""

    title: str
    text: str


def write_reports(report: Report, folder: Path) -> None:
    """Write ``report.json`` and ``report.html`` into ``folder``, each whole or not at all."""
    for name, text in (("report.json", report.to_json()), ("report.html", html(report, folder.name))):
        with replacing(folder / name) as partial:
            partial.write_text(text, encoding="utf-8")


def html(report: Report, folder: str = "", *, recipe: str = "") -> str:
    """The page of a run.

    Args:
        report: Of a finished run.
        folder: The name of its directory, for the commands to copy.
        recipe: The name of the recipe's file, where the model itself was not kept.
    """
    return page(
        "run.html",
        f"{model_name(report.model)}, {form(report)}",
        sentence=sentence(report),
        tiles=tiles(report),
        warnings=report.warnings,
        notes=[remarks(report), *report.notes],
        answers=[_answer(row) for row in report.answers.get("rows", [])],
        no_answers=report.answers.get("why", ""),
        now="before fine-tuning" if report.finetuning else "compressed",
        charts=charts_of_run(report),
        not_compressed=_not_compressed(report),
        use=[_repeat(report, recipe, folder)] if recipe else _use(report, folder or NO_FOLDER),
        use_title="Do it again" if recipe else "Use it",
        details=[part for part in _details(report) if part.rows],
        footer=_footer(report),
    )


def page(template: str, title: str, **context: Any) -> str:  # noqa: ANN401 - what a template shows
    """Fill in a template; all that is shown is escaped."""
    environment = _environment()
    script = environment.get_template("copy.js").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    shown = {"shown_warnings": SHOWN_WARNINGS, "script": script, "script_sum": digest, "title": title}
    return environment.get_template(template).render(**shown, **context).strip() + "\n"


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("sparlow.report")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def _answer(row: Mapping[str, str]) -> dict[str, str]:
    """A prompt with its two answers, and what they begin with alike: whole words."""
    found = [re.findall(r"\s*\S+|\s+$", row[name]) for name in ("dense", "compressed")]  # words with what is before
    alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(*found, strict=False)))
    dense, compressed = ("".join(one[alike:]) for one in found)
    return {"prompt": row["prompt"], "same": "".join(found[0][:alike]), "dense": dense, "compressed": compressed}


def _not_compressed(report: Report) -> Part:
    """What was not compressed, modules that differ in a number only in one row."""
    head = ("module", "why", "parameters", "modules", "stored in", "trained")
    alike: dict[tuple[str, ...], list[int]] = {}
    for row in report.not_compressed:
        stored = "the model's type" if row.get("stored", MODEL) == MODEL else str(row["stored"])
        about = (plain(row["why"]), stored, "yes" if row.get("trained") else "no")
        alike.setdefault((re.sub(r"\b\d+\b", "*", row["name"]), *about), []).append(row["parameters"])
    rows = [
        (name, why, plain(sum(sizes)), plain(len(sizes)), stored, trained)
        for (name, why, stored, trained), sizes in alike.items()
    ]
    return Part("What stayed as it was", head, rows, left=2)


def _use(report: Report, folder: str) -> list[Command]:
    """How to load, run, evaluate, export and repeat, from beside the directory."""
    here, corpus = shlex.quote(folder), shlex.quote(corpus_on_top(report) or "novel")
    load = (
        "import sparlow  # so that transformers knows the form\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained({folder!r}, dtype="auto")\n'
        f"tokenizer = AutoTokenizer.from_pretrained({folder!r})"
    )
    merged = shlex.quote(f"{folder}-merged")
    return [
        Command("Load", load),
        Command("Run", f"sparlow generate {here} --prompt {shlex.quote(PROMPT)}"),
        Command("Evaluate", f"sparlow evaluate {here} --evaluate {corpus}"),
        Command("Export", f"sparlow export {here} --out {merged} --as merged"),
        _repeat(report, f"{folder}/recipe.toml", f"{folder}-again"),
    ]


def _repeat(report: Report, recipe: str, out: str) -> Command:
    """How to compress once more by the same recipe."""
    model = report.model if report.model == model_name(report.model) else "MODEL"  # a path is of one machine only
    words = ("sparlow", "compress", model, "--recipe", recipe, "--out", out)
    return Command("Repeat", shlex.join(words))


def _details(report: Report) -> Iterable[Part]:
    yield Part("All figures", summary_head(report), summary_rows(report))
    if report.finetuning:
        yield Part("Fine-tuning, perplexity", ("text", "before", "after"), perplexities_of_finetuning(report))
        apart = ("loss", "perplexity", "versions", "machine", "seconds")
        rows = [(words(name), plain(value)) for name, value in report.finetuning.items() if name not in apart]
        yield Part("Fine-tuning, options", ("option", "value"), rows)
    yield _error_table(report.layers)
    yield Part("Layers", HEAD, [*layer_rows(report.layers)], left=4)
    yield Part("Experts", EXPERTS, [*expert_rows(report.experts)], left=2)
    trained = [report.distillation] if report.distillation else report.matching
    matched = [
        (_which(row), short(row["loss_before"]), short(row["loss_after"]), plain(row["epochs"])) for row in trained
    ]
    yield Part("Matching", ("blocks", "loss before", "loss after", "epochs"), matched)
    yield Part("Recipe", ("field", "value"), [(words(name), plain(value)) for name, value in report.recipe.items()])
    yield Part("Seconds", ("part", "time"), [(words(name), duration(value)) for name, value in report.seconds.items()])
    yield Part("Machine", ("", ""), [(words(name), plain(value)) for name, value in report.machine.items()])
    yield Part("Versions", ("package", "version"), [*report.versions.items()])


def _which(row: Mapping[str, Any]) -> str:
    return f"block {row['block']}" if "block" in row else "all together"


def _error_table(layers: Sequence[LayerRecord]) -> Part:
    """What the heat map shows, in numbers."""
    kinds = by_kind(layers)
    blocks = sorted({layer.block for layer in layers})
    rows = [(str(block), *(_cell(found.get(block, [])) for found in kinds.values())) for block in blocks]
    return Part("Relative error by block and kind of layer", ("block", *kinds), rows)


def _cell(layers: Sequence[LayerRecord]) -> str:
    return short(sum(layer.relative_error for layer in layers) / len(layers)) if layers else UNKNOWN


def _footer(report: Report) -> list[str]:
    made = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    when = f"Finished on {day(report.date)}. " if report.date else ""
    return [f"{when}Made with {made}.", described(report.machine)]
