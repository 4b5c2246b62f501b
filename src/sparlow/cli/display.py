"""What the command line shows: progress bars or plain lines, and tables. Prints; decides nothing."""

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.segment import Segment
from rich.text import Text

from sparlow.cli.tables import show_wide, table
from sparlow.errors import printable
from sparlow.files import human_bytes

if TYPE_CHECKING:  # help is shown without torch, which comes with these
    from sparlow.evaluation.perplexity import Evaluation
    from sparlow.exporting._registry import Exported
    from sparlow.planning.plan import Plan
    from sparlow.progress import Notify
    from sparlow.report.comparison import Comparison
    from sparlow.report.records import Report
    from sparlow.run.inspection import Line
    from sparlow.runtime.benchmark import Benchmark
    from sparlow.runtime.running import Clock

WIDE = 200  # columns where nobody looks, as in a pipe: no name is cut


class SafeConsole(Console):
    """A console on which text from files of strangers cannot do more than be read, and no word of ours is broken."""

    def print(self, *objects: Any, **options: Any) -> None:  # noqa: ANN401 - rich's signature
        """Print as rich does; on a terminal a sentence that is too long for a line goes on in the next at a word."""
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
    from sparlow.live import Lines, Screen, can_watch

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
    sys.stdout.write(printable(some))
    sys.stdout.flush()


def show_pace(clock: "Clock") -> None:
    """How long a text took, beside it and not in it."""
    rate = "" if clock.rate is None else f", then {clock.rate:.1f} tokens a second"
    err.print(f"{len(clock.stamps)} tokens: {clock.first:.2f} s to the first{rate}", highlight=False)


def show_benchmark(found: "Benchmark") -> None:
    """A line a row and number of texts: medians, and half of what lies between the slowest and the fastest run."""
    from statistics import median

    from sparlow.machine import described
    from sparlow.runtime.benchmark import spread

    names = {row.model: Path(row.model).name for row in found.rows}
    head = (
        "",
        "model",
        "mode",
        "type",
        "inputs",
        "step",
        "texts",
        "prompt tokens/s",
        "to first, s",
        "tokens/s",
        "×",
        "peak",
    )
    rows: list[tuple[str, ...]] = []
    for row in found.rows:
        for batch, rates in row.decode.items():
            times = found.times(row, batch)
            rates_said = f"{median(rates):.1f} ± {spread(rates):.0%}"
            measured = (f"{median(row.prefill[batch]):.0f}", f"{median(row.first[batch]):.2f}", rates_said)
            memory = (human_bytes(row.peak[batch]), human_bytes(row.interpreter), human_bytes(row.bytes_read))
            same = f"{'yes' if row.same_output else 'NO'} ({row.difference:.1e})"
            first = (str(len(rows) + 1), names[row.model], row.mode, row.dtype, row.inputs or "–", row.step, str(batch))
            rows.append((*first, *measured, "–" if times is None else f"{times:.2f}", *memory, same))
    show_wide(out, (*head, "before", "read a token", "same output"), rows)
    for note in found.notes:
        out.print(f"note: {escape(note)}", highlight=False)
    about = ", ".join(f"{name} {number}" for name, number in found.versions.items())
    out.print(f"{escape(described(found.machine))}; {about}", highlight=False)


def show_columns(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table whose first column says what the others are."""
    out.print(table(head, rows))


def show_comparison(found: "Comparison") -> None:
    """The table of a comparison: the dense model, then a line a method."""
    from sparlow.report.compare_page import task_table
    from sparlow.report.perplexities import labelled, shown, with_error

    corpora = shown([found.dense.get("perplexity", {}), *(row.perplexity for row in found.rows)])
    same = found.evaluation.get("in_domain", ())
    labels = [labelled(Path(name).name, [Path(name).name] if name in same else ()) for name in corpora]
    divergences = [name for name in corpora if any(row.agreement.get(name) for row in found.rows)]
    labels += [f"divergence, {Path(name).name}" for name in divergences]
    head = ("", *labels, "relative squared error", "values", "seconds", "size", "bits", "bits, whole file", "of blocks")
    rows = []
    if found.dense:
        perplexities = (f"{found.dense['perplexity'][name]:.2f}" for name in corpora)
        none = ("0",) * len(divergences)
        rows.append(("dense", *perplexities, *none, "0", "–", "–", human_bytes(found.dense["bytes"]), "–", "–", "–"))
    for row in found.rows:
        perplexities = (f"{row.perplexity[name]:.2f}" for name in corpora)
        known = (row.agreement.get(name) for name in divergences)
        apart = (with_error(one.divergence, one.divergence_stderr) if one else "–" for one in known)
        measured = (f"{row.mean_relative_error:.5f}", row.values, f"{row.seconds:.0f}", human_bytes(row.bytes))
        bits = (f"{row.bits_per_weight:.2f}", f"{row.bits_per_parameter:.2f}", f"{row.share_compressed:.1%}")
        rows.append((row.name, *perplexities, *apart, *measured, *bits))
    show_wide(out, head, rows)
    tasks, scores = task_table(found)
    if scores:
        show_wide(out, ("", *tasks[1:]), scores)


def show_plan(found: "Plan") -> None:
    """The result of ``sparlow plan``: layers, sizes, memory and time."""
    kinds = [
        (
            kind.name,
            str(kind.count),
            f"{kind.shape[0]} × {kind.shape[1]}",
            kind.pattern or "–",
            kind.values,
            str(kind.rank),
            f"{kind.parameters:,}",
            f"{kind.bytes_dense:,}",
            f"{kind.bytes_kept:,}",
        )
        for kind in found.layers
    ]
    show_wide(out, ("layer", "count", "shape", "pattern", "values", "rank", "parameters", "bytes", "kept"), kinds)
    rows = [(row["name"], str(row["count"]), f"{row['parameters']:,}", row["why"]) for row in found.not_compressed]
    show_wide(out, ("not compressed", "count", "parameters", "why"), rows)
    _show_sizes(found)
    _show_choices(found)
    here = f"of {found.device}" if found.peak_memory["device"] else "of the device"
    parts = [(stage.name, human_bytes(found.baseline + stage.cpu), human_bytes(stage.device)) for stage in found.stages]
    parts.append(("peak", human_bytes(found.peak_memory["rss"]), human_bytes(found.peak_memory["device"])))
    parts.append(("free now", _free(found.available["rss"]), _free(found.available["device"])))
    out.print(table(("memory at most", "main", here), parts))
    if found.seconds:
        times = [(stage, f"{spent:,.0f}") for stage, spent in found.seconds.items() if spent]
        out.print(table(("time", "seconds"), times))
    from sparlow.machine import described

    out.print(f"probed for {found.probe['seconds']:.1f} s on {escape(described(found.machine))}", highlight=False)
    for note in found.notes:
        out.print(f"note: {escape(note)}", highlight=False)


def _show_sizes(found: "Plan") -> None:

    sizes, files = found.bytes, found.disk
    second = f" ({human_bytes(files.second)} of it for a while, for --match)" if files.second else ""
    hidden = f"; {human_bytes(files.hidden)} of hidden states in temporary files" if files.hidden else ""
    out.print(
        f"whole model {human_bytes(sizes['dense'])} → {human_bytes(sizes['compressed'])}, linear layers "
        f"{human_bytes(sizes['linears_dense'])} → {human_bytes(sizes['linears_compressed'])}, "
        f"{found.bits_per_weight:.2f} bits a weight\n"
        f"{found.share_compressed:.1%} of the parameters of the blocks are compressed; the whole file has "
        f"{found.bits_per_parameter:.2f} bits a parameter\n"
        f"disk {human_bytes(files.out)}{second}{hidden}; {_free(found.available['disk'])} are free",
        highlight=False,
    )


def _show_choices(found: "Plan") -> None:
    """The forms that the model can take, and what is known of each."""
    from sparlow.planning.choices import measured

    rows = []
    for choice in found.choices:
        fits = {None: "", True: "fits", False: "too large"}[choice.fits]
        quality = "not measured" if choice.perplexity is None else f"{choice.perplexity:.2f} ×"
        options = " ".join(f"--{name} {value}" for name, value in choice.recipe.items())
        sizes = (human_bytes(choice.bytes), f"{choice.bits:.2f}", fits, quality)
        rows.append((choice.name, *sizes, choice.speed, "; ".join(choice.opened_by), options))
    head = ("form", "whole file", "bits", "", "perplexity", "on a CPU (packed)", "opened by", "options")
    show_wide(out, head, rows, left=True)
    for left in found.left_out:
        out.print(f"left out: {', '.join(left.names)}: {left.why}", markup=False, highlight=False)
    about = measured()
    out.print(
        f"perplexity as a multiple of the dense model's, measured with {about['model']} ({about['text']}). "
        "Other models differ: measure yours. Options not shown are the defaults.",
        markup=False,
        highlight=False,
    )


def _free(size: int | None) -> str:
    return "–" if size is None else human_bytes(size)


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


def show_evaluations(
    found: "Mapping[str, Evaluation]",
    seqlen: int,
    in_domain: Mapping[str, Sequence[str]] = MappingProxyType({}),
    notes: Sequence[str] = (),
) -> None:
    """The result of ``sparlow evaluate``: a column a model, lines a corpus or task, then the mean of the tasks.

    Args:
        found: By the name of the model.
        seqlen: Tokens in a window.
        in_domain: Names of texts that come from the source of the model's calibration text, by the name of the model.
        notes: Sentences to add.
    """
    from sparlow.report.perplexities import FLATTERS, agreement_rows, shown

    first = next(iter(found.values()))
    same = {name for names in in_domain.values() for name in names}
    rows = []
    for name in shown([one["perplexity"] for one in found.values()]):
        label = f"perplexity (seqlen {seqlen}), {name}"
        label += f" ({FLATTERS.format('calibration')})" if name in same else ""
        measured = [(one["perplexity"][name], one["perplexity_stderr"][name]) for one in found.values()]
        rows.append((label, *(_with_error(*figures) for figures in measured)))
        beside = [one["agreement"] for one in found.values() if "agreement" in one]  # of the last, if there are two
        for agreement in beside:
            rows += [(what, "–", value) for what, value in agreement_rows(name, agreement[name])]
    for name, result in first.get("tasks", {}).items():
        label = f"{name}, {result['metric']}" + (f", {result['fewshot']}-shot" if result["fewshot"] else "")
        results = [one["tasks"][name] for one in found.values()]
        rows.append((label, *(_with_error(one["value"], one["stderr"]) for one in results)))
    means = [one.get("average") for one in found.values()]
    if len(first.get("tasks", {})) > 1 and None not in means:
        rows.append(("average", *(f"{mean:.4f}" for mean in means)))
    short = [Path(name).name or name for name in found]
    out.print(table(("", *(short if len(set(short)) == len(short) else found)), rows))
    for note in notes:
        out.print(f"note: {escape(note)}", highlight=False)


def _with_error(value: float, stderr: float | None) -> str:
    return f"{value:.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")


def show_layers(lines: "Sequence[Line]") -> None:
    """The table of ``sparlow inspect``."""
    out.print(table(("layer", "shape", "pattern", "values", "density", "rank", "bytes"), lines))


def show_cost(found: "Plan") -> None:
    """The first line of a run: what it will take."""
    from sparlow.linalg.patterns import parse_pattern

    sizes, free = found.bytes, found.available
    spent = f"about {max(found.seconds['total'] / 60, 1):.0f} minutes, " if found.seconds else ""
    main = f"at most {human_bytes(found.peak_memory['rss'])} of main memory"
    main += "" if free["rss"] is None else f" ({human_bytes(free['rss'])} are free)"
    whole = f"{human_bytes(sizes['dense'])} → {human_bytes(sizes['compressed'])}"
    out.print(f"this will take {spent}{main}, {whole} on disk", markup=False, highlight=False)
    patterns = dict.fromkeys(kind.pattern for kind in found.layers if kind.pattern)
    densities = {pattern: parse_pattern(pattern).density for pattern in patterns}
    said = {pattern: "every entry" if d == 1 else f"{d:.3g} of the entries" for pattern, d in densities.items()}
    kept = [f"{pattern} keeps {what} of S" for pattern, what in said.items()]
    out.print(f"pattern {'; '.join(kept[:3])}", markup=False, highlight=False)


def show_export(found: "Exported") -> None:
    """The result of ``sparlow export``: size, what was rounded, and how to open it."""
    out.print(f"written to {found.out}: {found.form}, {human_bytes(found.bytes)}", markup=False, highlight=False)
    for note in found.notes:
        out.print(f"note: {note}", markup=False, highlight=False)
    for line in found.commands:
        out.print(Text(line))  # whole, to be copied
