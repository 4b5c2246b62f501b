"""What ``sparlow benchmark`` shows."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from sparlow.cli import display
from sparlow.cli.tables import show_wide
from sparlow.files import human_bytes

if TYPE_CHECKING:  # help is shown without torch, which comes with it
    from sparlow.runtime.benchmark import Benchmark


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
    show_wide(display.out, (*head, "before", "read a token", "same output"), rows)
    for note in found.notes:
        display.out.print(f"note: {escape(note)}", highlight=False)
    about = ", ".join(f"{name} {number}" for name, number in found.versions.items())
    display.out.print(f"{escape(described(found.machine))}; {about}", highlight=False)
