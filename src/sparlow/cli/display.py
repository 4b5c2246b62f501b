"""What the command line shows: progress bars or plain lines, and tables. Prints; decides nothing."""

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.control import Control
from rich.markup import escape
from rich.segment import Segment
from rich.text import Text

from sparlow.cli import waiting
from sparlow.cli.tables import table
from sparlow.errors import printable
from sparlow.files import human_bytes

if TYPE_CHECKING:  # help is shown without torch, which comes with these
    from sparlow.exporting._registry import Exported
    from sparlow.model.artefact.describe import LayerInfo
    from sparlow.progress import Notify
    from sparlow.report.records import Report
    from sparlow.runtime.running import Clock

WIDE = 200  # columns where nobody looks, as in a pipe: no name is cut


class SafeConsole(Console):
    """A console on which text from files of strangers cannot do more than be read, and no word of ours is broken."""

    def print(self, *objects: Any, **options: Any) -> None:  # noqa: ANN401 - rich's signature
        """Print as rich does; on a terminal a sentence that is too long for a line goes on in the next at a word."""
        if not (objects and isinstance(objects[0], Control)):  # such as what moves the cursor, of the sign itself
            waiting.end()
        if self.is_terminal and len(objects) == 1 and isinstance(objects[0], str):
            choices = {name: options.pop(name, None) for name in ("markup", "highlight")}
            objects = (at_words(self.render_str(objects[0], **choices), self.width),)
        super().print(*objects, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield what is shown, with a mark in the place of control characters that are not rich's own."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text), style, control)


def at_words(text: Text, width: int) -> Text:
    """Break the lines of a text between words, never within one: what is longer than a line is a path, to be copied."""
    found = []
    for line in text.split("\n", allow_blank=True):
        breaks, used = [], 0
        indent = " " * (len(line.plain) - len(line.plain.lstrip()))
        for word in re.finditer(r"\s*\S+", line.plain):
            used += cell_len(word[0])
            if used > width and word.start():
                breaks.append(word.start() + len(word[0]) - len(word[0].lstrip()))
                used = cell_len(indent + word[0].strip())
        parts = line.divide(breaks)
        for part in parts[:-1]:
            part.rstrip()
        found += [parts[0], *(Text(indent).append_text(part) for part in parts[1:])] if parts else [line]
    return Text("\n").join(found)


out = SafeConsole(soft_wrap=True, width=None if sys.stdout.isatty() else WIDE)
err = SafeConsole(stderr=True, soft_wrap=True)
silent = False  # set by --quiet: errors only
verbose = False  # set by --verbose: a line a layer, and every warning


@contextmanager
def progress() -> "Iterator[Notify]":
    """Show a run as it goes: live on a terminal, otherwise a line a block; nothing with --quiet."""
    from sparlow.progress.live import Lines, Screen, can_watch

    waiting.end()
    if silent:
        yield lambda _: None
    elif verbose or not can_watch(err):
        yield Lines(lambda text: err.print(text, markup=False, highlight=False), every_layer=verbose)
    else:
        with Screen(err).on() as screen:
            yield screen


def show_report(report: "Report") -> None:
    """The summary of a run: perplexities and sizes, dense beside compressed, time, memory, warnings."""
    from sparlow.report.summary import remarks, summary_rows

    out.print(table(("", "dense", "compressed"), summary_rows(report)))
    seconds = report.seconds
    blocks = 1 + max(layer.block for layer in report.layers)
    out.print(
        f"{seconds['total']:.0f} s: {seconds['solve']:.0f} s solving ({seconds['solve'] / blocks:.1f} s a block), "
        f"{seconds['statistics'] + seconds['walk']:.0f} s walking, {seconds['evaluate']:.0f} s evaluating; "
        f"peak memory {human_bytes(report.peak_memory['rss'])}",
        highlight=False,
    )
    fewer = [row for row in report.not_compressed if row.get("stored")]
    for row in fewer:
        out.print(f"{row['parameters']:,} of the {row['why']} are stored in {row['stored']}", highlight=False)
    still = [row["parameters"] for row in report.not_compressed if not row.get("trained") and row not in fewer]
    out.print(f"{sum(still):,} parameters in {len(still)} modules stay as they are", highlight=False)
    trained = [row["parameters"] for row in report.not_compressed if row.get("trained")]
    if trained:
        out.print(f"{sum(trained):,} in {len(trained)} norms were trained with the compressed layers", highlight=False)
    matched = matching_said(report)
    if matched:
        out.print(matched, highlight=False)
    out.print(remarks(report), highlight=False)
    for warning in report.warnings[: None if verbose else 10]:
        out.print(f"[yellow]warning:[/] {escape(warning)}", highlight=False)
    if len(report.warnings) > 10 and not verbose:  # noqa: PLR2004 - a screenful
        out.print(f"and {len(report.warnings) - 10} more warnings in report.json", highlight=False)
    for note in report.notes:
        out.print(escape(note), highlight=False)


def matching_said(report: "Report") -> str:
    """What matching did, in one sentence; empty if there was none."""
    rows = [report.distillation] if report.distillation else report.matching
    if not rows:
        return ""
    before, after = (sum(row[name] for row in rows) / len(rows) for name in ("loss_before", "loss_after"))
    what = "loss towards the dense logits" if report.distillation else f"mean loss of {len(rows)} blocks"
    spent = sum(row["seconds"] for row in rows)
    if after >= before:
        return f"matching: {what} did not fall below {before:.5g}, so nothing was changed; {spent:.0f} s"
    return f"matching: {what} {before:.5g} → {after:.5g} ({1 - after / before:.0%} less); {spent:.0f} s"


def text(some: str) -> None:
    """A few letters of a text that is being written."""
    waiting.end()
    sys.stdout.write(printable(some))
    sys.stdout.flush()


def show_pace(clock: "Clock") -> None:
    """How long a text took, beside it and not in it."""
    rate = "" if clock.rate is None else f", then {clock.rate:.1f} tokens a second"
    err.print(f"{len(clock.stamps)} tokens: {clock.first:.2f} s to the first{rate}", highlight=False)


def show_columns(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table whose first column says what the others are."""
    out.print(table(head, rows))


def show_adapter(folder: Path | None) -> None:
    """Where the adapter in PEFT's form lies, if one was asked for."""
    if folder is not None:
        out.print(f"the adapter lies in {folder}, its base in {folder / 'base'}", markup=False, highlight=False)


def show_finetuning(report: "Report") -> None:
    """The result of ``sparlow finetune``: perplexities and loss before and after."""
    from sparlow.report.summary import perplexities_of_finetuning

    found = report.finetuning
    out.print(table(("", "before", "after"), perplexities_of_finetuning(report)))
    chats = found.get("chats")
    out.print(
        f"{found['steps']} steps of {found['batch'] * found['accumulate']} {'chats' if chats else 'windows'}, "
        f"{found['trainable']:,} numbers trained, loss {found['loss'][0]:.3f} → {found['loss'][-1]:.3f}, "
        f"{found['seconds']:.0f} s",
        highlight=False,
    )
    if chats:
        out.print(
            f"learnt were the answers: {chats['answer_tokens']:,} of {chats['tokens']:,} tokens of "
            f"{found['windows']:,} chats",
            highlight=False,
        )


def show_layers(layers: "Sequence[LayerInfo]", patterns: Mapping[str, str]) -> None:
    """The result of ``sparlow inspect``."""
    rows = [
        (
            layer.name,
            f"{layer.shape[0]} × {layer.shape[1]}",
            patterns.get(layer.name, "–"),
            layer.dtype,
            f"{layer.density:.4f}",
            str(layer.rank),
            f"{layer.bytes:,}",
        )
        for layer in layers
    ]
    out.print(table(("layer", "shape", "pattern", "values", "density", "rank", "bytes"), rows))


def show_export(found: "Exported") -> None:
    """The result of ``sparlow export``: size, what was rounded, and how to open it."""
    out.print(f"written to {found.out}: {found.form}, {human_bytes(found.bytes)}", markup=False, highlight=False)
    for note in found.notes:
        out.print(f"note: {note}", markup=False, highlight=False)
    for line in found.commands:
        out.print(Text(line))  # whole, to be copied
