"""What ``sparlow plan`` shows, and the first lines of ``sparlow compress``."""

from typing import TYPE_CHECKING

from rich.markup import escape

from sparlow.cli import display
from sparlow.cli.tables import show_wide, table
from sparlow.files import human_bytes

if TYPE_CHECKING:  # help is shown without torch, which comes with it
    from sparlow.planning.plan import Plan

BARELY = 0.01  # of what was asked for: below it figures as they are shown may be the same


def show_cost(found: "Plan") -> None:
    """The first line of a run: what it will take."""
    from sparlow.linalg.patterns import parse_pattern

    sizes, free = found.bytes, found.available
    spent = f"about {max(found.seconds['total'] / 60, 1):.0f} minutes, " if found.seconds else ""
    main = f"at most {human_bytes(found.peak_memory['rss'])} of main memory"
    main += "" if free["rss"] is None else f" ({human_bytes(free['rss'])} are free)"
    whole = f"{human_bytes(sizes['dense'])} → {human_bytes(sizes['compressed'])}"
    display.out.print(f"this will take {spent}{main}, {whole} on disk", markup=False, highlight=False)
    patterns = dict.fromkeys(kind.pattern for kind in found.layers if kind.pattern)
    densities = {pattern: parse_pattern(pattern).density for pattern in patterns}
    said = {pattern: "every entry" if d == 1 else f"{d:.3g} of the entries" for pattern, d in densities.items()}
    kept = [f"{pattern} keeps {what} of S" for pattern, what in said.items()]
    display.out.print(f"pattern {'; '.join(kept[:3])}", markup=False, highlight=False)


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
    show_wide(
        display.out, ("layer", "count", "shape", "pattern", "values", "rank", "parameters", "bytes", "kept"), kinds
    )
    rows = [(row["name"], str(row["count"]), f"{row['parameters']:,}", row["why"]) for row in found.not_compressed]
    show_wide(display.out, ("not compressed", "count", "parameters", "why"), rows)
    _show_sizes(found)
    _show_choices(found)
    here = f"of {found.device}" if found.peak_memory["device"] else "of the device"
    parts = [(stage.name, human_bytes(found.baseline + stage.cpu), human_bytes(stage.device)) for stage in found.stages]
    parts.append(("peak", human_bytes(found.peak_memory["rss"]), human_bytes(found.peak_memory["device"])))
    parts.append(("free now", _free(found.available["rss"]), _free(found.available["device"])))
    display.out.print(table(("memory at most", "main", here), parts))
    if found.seconds:
        times = [(stage, f"{spent:,.0f}") for stage, spent in found.seconds.items() if spent]
        display.out.print(table(("time", "seconds"), times))
    from sparlow.machine import described

    display.out.print(
        f"probed for {found.probe['seconds']:.1f} s on {escape(described(found.machine))}", highlight=False
    )
    for note in found.notes:
        display.out.print(f"note: {escape(note)}", highlight=False)


def _show_sizes(found: "Plan") -> None:
    sizes, files = found.bytes, found.disk
    second = f" ({human_bytes(files.second)} of it for a while, for --match)" if files.second else ""
    hidden = f"; {human_bytes(files.hidden)} of hidden states in temporary files" if files.hidden else ""
    display.out.print(
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
        # 4.504 bits are shown as 4.50, and are more than 4.5
        barely = f" by {max(choice.over, 0.001):.1%}" if choice.over < BARELY else ""
        fits = {None: "", True: "fits", False: f"too large{barely}"}[choice.fits]
        quality = "not measured" if choice.perplexity is None else f"{choice.perplexity:.2f} ×"
        options = " ".join(f"--{name} {value}" for name, value in choice.recipe.items())
        sizes = (human_bytes(choice.bytes), f"{choice.bits:.2f}", fits, quality)
        rows.append((choice.name, *sizes, choice.speed, "; ".join(choice.opened_by), options))
    head = ("form", "whole file", "bits", "", "perplexity", "on a CPU (packed)", "opened by", "options")
    show_wide(display.out, head, rows, left=True)
    for left in found.left_out:
        display.out.print(f"left out: {', '.join(left.names)}: {left.why}", markup=False, highlight=False)
    about = measured()
    display.out.print(
        f"perplexity as a multiple of the dense model's, measured with {about['model']} ({about['text']}). "
        "Other models differ: measure yours. Options not shown are the defaults.",
        markup=False,
        highlight=False,
    )


def _free(size: int | None) -> str:
    return "–" if size is None else human_bytes(size)
