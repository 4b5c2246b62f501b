"""The page docs/options.md, written from the declarations: ``python -m sparlow.cli.reference > docs/options.md``."""

from collections.abc import Iterable
from typing import Any

from typer.models import OptionInfo

from sparlow.algorithms import algorithms
from sparlow.cli.comparing import CompareOptions
from sparlow.cli.options import EvaluateOptions, WriteOptions
from sparlow.exporting._registry import forms
from sparlow.finetuning.options import FinetuneOptions
from sparlow.recipe.recipe import Recipe
from sparlow.recipe.run_options import RunOptions
from sparlow.runtime.options import BenchmarkOptions, RunningOptions, TextOptions
from sparlow.schema import Bound, Doc, FileOnly, Option, Panel, options_of

INTRODUCTION = """# Options

Written by `make docs-options` from the declarations in the code. Do not edit it by hand.

On the command line an option is `--name`, with hyphens for underscores. A switch is turned on by `--name`. A list is
given by repeating the option or by separating with commas. In a recipe file (TOML) and in Python the names are as here.
"""
RECIPE = """What decides the result: options of `compress`, `plan` and `compare`, fields of a recipe file, arguments of
`sparlow.Recipe`. `options` is a table in a file and `--option key=value` on the command line; `layers` is only in files
and Python."""
RUN = """How a run is done: options of `compress`, `plan` and `compare`, and keywords of `sparlow.compress` and
`sparlow.plan`. `finetune` and `evaluate` take some of them."""
SECTIONS: tuple[tuple[str, str, type], ...] = (
    ("Recipe", RECIPE, Recipe),
    ("Run options", RUN, RunOptions),
    ("Writing", "Options of `compress` and `compare`, and keywords of `sparlow.compress`.", WriteOptions),
    ("Comparing", "Options of `compare`.", CompareOptions),
    ("Fine-tuning", "Options of `finetune`, and keywords of `sparlow.finetune`.", FinetuneOptions),
    ("Evaluation", "Options of `evaluate`.", EvaluateOptions),
    ("Running", "Options of `generate`.", RunningOptions),
    ("Text", "Options of `generate`, beside `prompt`, the text to go on from.", TextOptions),
    ("Measuring speed", "Options of `benchmark`.", BenchmarkOptions),
)


def page() -> str:
    """The whole page in Markdown."""
    parts = [INTRODUCTION]
    for title, text, record in SECTIONS:
        options = sorted(options_of(record).values(), key=lambda option: list(_panels(record)).index(_panel(option)))
        parts.append(f"## {title}\n\n{text}\n\n{_table(options)}")
    parts.append(
        "## Options of the algorithms\n\nGiven as `--option key=value`, or in the table `options` of a recipe.\n"
    )
    for algorithm in algorithms():
        names = ", ".join(f"`{name}`" for name in (algorithm.name, *algorithm.aliases))
        rows = [f"| `{o.name}` | {_cell(o.choices)} | {_cell(o.shown_default)} |" for o in algorithm.options.values()]
        table = (
            "\n".join(["| option | value | default |", "|---|---|---|", *rows, ""]) if rows else "It has no options.\n"
        )
        parts.append(f"### {names}\n\n{_cell(algorithm.summary)}\n\n{table}")
    parts.append("## Options of the forms of export\n\nGiven as `--option key=value` to `sparlow export`.\n")
    for one in forms():
        table = _table(one.options.values()) if one.options else "It has no options.\n"
        parts.append(f"### `{one.name}`\n\n{_cell(one.summary)}\n\n{table}")
    return "\n".join(parts)


def _table(options: Iterable[Option]) -> str:
    lines = ["| group | option | value | default | meaning |", "|---|---|---|---|---|"]
    for option in options:
        cells = (_panel(option), f"`{_name(option)}`", _value(option), _default(option), _doc(option))
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return "\n".join([*lines, ""])


def _panels(record: Any) -> dict[str, None]:  # noqa: ANN401 - any dataclass
    return dict.fromkeys(_panel(option) for option in options_of(record).values())


def _name(option: Option) -> str:
    declared = option.note(OptionInfo)
    flag = declared.default if declared else None  # where typer keeps the first declaration inside of Annotated
    return flag.partition("/")[0].removeprefix("--").replace("-", "_") if isinstance(flag, str) else option.name


def _panel(option: Option) -> str:
    panel, declared = option.note(Panel), option.note(OptionInfo)
    return panel.title if panel else (declared.rich_help_panel or "") if declared else ""


def _doc(option: Option) -> str:
    doc, declared = option.note(Doc), option.note(OptionInfo)
    return doc.text if doc else (declared.help or "") if declared else ""


def _value(option: Option) -> str:
    bound, declared = option.note(Bound), option.note(OptionInfo)
    if declared and declared.metavar:
        return f"`{declared.metavar}`"
    if option.words:
        return ", ".join(f"`{word}`" for word in option.words)
    if option.repeatable:
        return "list of tables" if option.note(FileOnly) else "list of names"
    if bound and bound.text.startswith("a "):
        return bound.text
    words = {int: "whole number", float: "number", bool: "switch", str: "text"}
    return words.get(option.kind, "table" if option.note(FileOnly) else "path") + (f", {bound.text}" if bound else "")


def _default(option: Option) -> str:
    declared = option.note(OptionInfo)
    if declared and isinstance(declared.show_default, str):
        return declared.show_default
    if declared and option.default is None:
        return ""
    if option.kind is bool:
        return "on" if option.default else "off"
    return (
        option.shown_default
        if option.default not in (None, (), {}) or option.shown_default != str(option.default)
        else ""
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(page(), end="")  # noqa: T201 - the page itself
