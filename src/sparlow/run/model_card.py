"""The model card of a result: what it is, how to load and serve it, its recipe, and what its base asks for."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w
import yaml

from sparlow.errors import printable
from sparlow.files import human_bytes
from sparlow.model import _transformers as private
from sparlow.model.artefact.card import MARK, read_card, write_card
from sparlow.model.loading.streaming import CannotStreamError, as_transformers_reads
from sparlow.report.perplexities import shown
from sparlow.report.records import Report
from sparlow.report.value_types import MODEL

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_FRONT = re.compile(r"\A---\r?\n(.*?)\r?\n---\r?\n", re.DOTALL)
_BIBTEX = re.compile(r"^@\w+\{.*?^\}", re.DOTALL | re.MULTILINE)
_LONGEST = 4_000  # characters of a citation
_FIELDS = ("license", "license_name", "license_link", "language")  # of the base's card, that hold for the result, too
_HIDDEN = ("column", "dtype", "bos")  # fields of a recipe that nobody asks for


def write_model_card(report: Report, folder: Path, files: Sequence[Path] = ()) -> bool:
    """Write README.md into the directory of a result, unless somebody has made the one that is there his own.

    Args:
        report: Of the result.
        folder: Its directory.
        files: That came along with the base, such as its licence.
    """
    return write_card(card(report, base_card(report.model), [file.name for file in files]), folder)


def base_card(name: str) -> str:
    """Return the model card of the base, a directory or an id of the hub; empty if it has none, or cannot be asked."""
    if Path(name).exists():
        return read_card(Path(name)) if Path(name).is_dir() else ""
    if not _HUB_ID.fullmatch(name):
        return ""
    options: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False}
    options |= {"_raise_exceptions_for_connection_errors": False, "_raise_exceptions_for_gated_repo": False}
    try:
        with as_transformers_reads():
            found = private.cached_file(name, "README.md", **options)
    except CannotStreamError:
        return ""
    return "" if found is None else read_card(Path(found).parent)


def card(report: Report, base: str = "", files: Sequence[str] = ()) -> str:
    """Return the text of the card.

    Args:
        report: Of the result.
        base: The card of the base.
        files: Names of files that came along with the base.
    """
    name = Path(report.model).name or "model"
    parts = [
        _front(report, base),
        f"{MARK}\n",
        f"# {name}, compressed with sparlow\n",
        f"Every linear weight `W` in the blocks of {_base(report)} was replaced by `S + U V`: {_kept(report)}.\n",
        _table(report),
        _use(),
        f"## Recipe\n\n```toml\n{tomli_w.dumps(_recipe(report)).strip()}\n```\n",
        "`recipe.toml` beside this file repeats it: `sparlow compress BASE --out OUT --recipe recipe.toml`.\n",
        _dense(report),
        _licence(report, base, files),
    ]
    return printable("\n".join(part for part in parts if part))


def _front(report: Report, base: str) -> str:
    """The head of the card that the hub reads."""
    front = _read_front(base)
    about: dict[str, Any] = {name: front[name] for name in _FIELDS if isinstance(front.get(name), str | list)}
    if _HUB_ID.fullmatch(report.model) and not Path(report.model).exists():
        about |= {"base_model": report.model, "base_model_relation": "quantized"}
    about |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    about["tags"] = ["sparlow", "sparse", "low-rank", str(report.recipe.get("algorithm", ""))]
    return f"---\n{yaml.safe_dump(about, sort_keys=False, allow_unicode=True)}---\n"


def _read_front(text: str) -> Mapping[str, Any]:
    found = _FRONT.match(text)
    try:
        front = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError:
        front = {}
    return front if isinstance(front, dict) else {}


def _base(report: Report) -> str:
    if _HUB_ID.fullmatch(report.model) and not Path(report.model).exists():
        return f"[{report.model}](https://huggingface.co/{report.model})"
    return f"`{Path(report.model).name}`"


def _kept(report: Report) -> str:
    """What S and U V are, in one clause."""
    patterns = dict.fromkeys(layer.pattern for layer in report.layers)
    ranks = sorted({layer.rank for layer in report.layers})
    pattern = next(iter(patterns), "") if len(patterns) == 1 else f"patterns {', '.join([*patterns][:4])}"
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}" if ranks else "rank 0"
    values = "" if report.value_types == MODEL else f", values in {report.value_types}"
    return f"{pattern} and {rank}{values}, found by {report.recipe.get('algorithm', '')}"


def _table(report: Report) -> str:
    dense = report.dense["perplexity"]
    tuned = report.finetuning.get("perplexity", {}).get("after")
    now = report.compressed["perplexity"] if tuned is None else tuned
    rows = [
        (f"perplexity, {Path(name).name}", _figure(dense.get(name)), _figure(now.get(name)))
        for name in shown([dense, now])
    ]
    sizes = report.bytes
    rows.append(("whole model", human_bytes(sizes["dense"]), human_bytes(sizes["compressed"])))
    rows.append(("compressed layers", human_bytes(sizes["linears_dense"]), human_bytes(sizes["linears_compressed"])))
    rows.append(("bits a compressed weight", "", f"{report.bits_per_weight:.2f}"))
    rows.append(("bits a parameter, whole file", "", f"{report.bits_per_parameter:.2f}"))
    rows.append(("mean relative squared error of the layers' outputs", "0", f"{report.mean_relative_error:.5f}"))
    after = "fine-tuned" if report.finetuning else "compressed"
    lines = [f"| | dense | {after} |", "|---|--:|--:|", *(f"| {' | '.join(map(_cell, row))} |" for row in rows)]
    seqlen = f"Perplexity in windows of {report.recipe.get('seqlen')} tokens unless another length was asked for.\n"
    return "\n".join([*lines, "", seqlen] if now else [*lines, ""])


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _use() -> str:
    return """## Load and serve

```python
import sparlow  # teaches transformers the format: pip install sparlow
from transformers import AutoTokenizer

model = sparlow.load("DIR", mode="packed")  # DIR or the id of this repository; as it is stored, on the CPU
tokenizer = AutoTokenizer.from_pretrained("DIR")
```

`AutoModelForCausalLM.from_pretrained("DIR")` opens it after `import sparlow`, too, on any device, to
be trained or evaluated.

```
sparlow generate DIR --prompt "The capital of France is"
sparlow evaluate DIR --evaluate wikitext2
sparlow export DIR --out MERGED --as merged    # for programs that do not know sparlow; --list shows more forms
```
"""


def _recipe(report: Report) -> dict[str, Any]:
    """The recipe without what nobody asks for; of paths the name alone, as they are of another machine."""
    found = {
        name: value for name, value in report.recipe.items() if name not in _HIDDEN and value not in ({}, [], None)
    }
    text = str(found.get("calibration", ""))
    return found | ({"calibration": Path(text).name} if Path(text.partition("#")[0]).is_absolute() else {})


def _dense(report: Report) -> str:
    rows = [row for row in report.not_compressed if not row.get("stored")]
    if not rows:
        return ""
    kinds: dict[str, int] = {}
    for row in rows:
        kinds[row["why"]] = kinds.get(row["why"], 0) + row["parameters"]
    lines = [f"* {count:,} parameters: {why}" for why, count in sorted(kinds.items(), key=lambda one: -one[1])]
    return "\n".join(["## What stays as it is\n", *lines, ""])


def _licence(report: Report, base: str, files: Sequence[str]) -> str:
    """Licence and citation of the base, as far as they are known here."""
    licence = _read_front(base).get("license")
    known = f"The licence of the base, {licence}, holds for this model, too" if isinstance(licence, str) else ""
    where = f"`{'`, `'.join(files)}`" if files else ""
    said = (
        known or "The licence of the base holds for this model, too. It is not on record here: see the base's own page"
    )
    lines = ["## Licence and citation\n", f"{said}{f' ({where})' if where else ''}.\n"]
    cited = list(_citations(base))
    if cited:
        lines += [f"Cite the base, {_base(report)}:\n", "```bibtex", *cited, "```\n"]
    return "\n".join(lines)


def _citations(base: str) -> Iterator[str]:
    left = _LONGEST
    for found in _BIBTEX.finditer(base):
        left -= len(found[0])
        if left < 0:
            return
        yield found[0].replace("```", "")
