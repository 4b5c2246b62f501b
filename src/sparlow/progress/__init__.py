"""Progress of a run: steps for display, and seconds by kind of work."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from sparlow.report.records import LayerRecord

KINDS = ("total", "walk", "statistics", "solve", "matching", "save", "evaluate")  # keys of report.json
RESTORED = "restored"  # the note of a step that an earlier process has done


@dataclass(frozen=True)
class Progress:
    """One step of a run.

    Attributes:
        stage: What is going on: "dense perplexity", "blocks", "compressed perplexity", "fine-tuning", …
        done: Steps finished.
        total: Steps in all.
        layer: The layer that was just compressed, if that is the step.
        note: What else is worth showing of the step, such as its loss.
    """

    stage: str
    done: int
    total: int
    layer: LayerRecord | None = None
    note: str = ""


Notify = Callable[[Progress], None]


def labelled(notify: Notify, *, before: str = "", after: str = "") -> Notify:
    """Wrap ``notify`` to add a prefix or suffix to every stage name."""

    def tell(step: Progress) -> None:
        notify(replace(step, stage=f"{before}{step.stage}{after}"))

    return tell


def counting(notify: Notify, stage: str, total: int) -> Callable[[int], None]:
    """Return a function that takes how many more steps are done, and notifies of how many are done in all."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        notify(Progress(stage, done, total))

    return advance


class Clock:
    """Adds up seconds by kind of work."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(KINDS, 0.0)

    def so_far(self) -> dict[str, float]:
        """All kinds, "total" as the sum of the others: it is counted only at the end."""
        parts = {kind: seconds for kind, seconds in self.seconds.items() if kind != "total"}
        return {"total": sum(parts.values()), **parts}

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add the seconds of an earlier part of the same run."""
        for kind, spent in seconds.items():
            self.seconds[kind] += spent

    @contextmanager
    def __call__(self, kind: str) -> Iterator[None]:
        """Count the time spent inside."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[kind] += time.perf_counter() - start
