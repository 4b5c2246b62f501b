"""A run as it goes: one live display on a terminal or in a notebook, else a line a block; and the log for programs.

``watched`` is what every function that takes long uses where the caller gave no function of its own.
"""

import importlib.util
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sparlow.errors import printable
from sparlow.files import human_bytes
from sparlow.progress import RESTORED, Notify, Progress

if TYPE_CHECKING:
    from rich.console import Console, Group

LOG = logging.getLogger("sparlow")
LOG.addHandler(logging.NullHandler())  # quiet, unless the program that imports sparlow asks for it
BAR, NARROW = 24, 60  # characters of the bar, and of a screen that has no room for one


@dataclass
class Stage:
    """One part of a run.

    Attributes:
        name: As steps call it.
        total: Its steps.
        begun: When this process began it, by ``time.monotonic``.
        done: Steps that are finished.
        restored: Of these, those that an earlier process has done.
        now: When its last step came.
        errors: Relative errors of the layers so far.
        layer: The last of them, as it is shown.
        note: What else the last step said.
    """

    name: str
    total: int
    begun: float
    done: int = 0
    restored: int = 0
    now: float = 0.0
    errors: list[float] = field(default_factory=list)
    layer: str = ""
    note: str = ""

    @property
    def seconds(self) -> float:
        """Spent so far."""
        return self.now - self.begun

    @property
    def left(self) -> float | None:
        """Seconds that the rest takes if it goes on like this; None while nobody knows."""
        own = self.done - self.restored
        return self.seconds / own * (self.total - self.done) if own > 0 else None

    @property
    def error(self) -> str:
        """The mean relative error so far, and how much it is of."""
        return f"mean relative squared error {sum(self.errors) / len(self.errors):.5f}" if self.errors else ""


class Watch:
    """What the steps of a run add up to.

    Attributes:
        stage: That is going on.
        resumed: The number of the first block that is not restored, until it has been told.
    """

    def __init__(self) -> None:
        self.stage: Stage | None = None
        self.resumed: int | None = None
        self._last = (
            time.monotonic()
        )  # a stage is told of after its first step, and was begun when the one before ended

    def take(self, step: Progress) -> Stage | None:
        """Note a step; return the stage before, if this step begins another."""
        now, before = time.monotonic(), None
        if self.stage is None or self._begins(step, self.stage):
            before, self.stage = self.stage, Stage(step.stage, step.total, self._last)
        stage, self._last = self.stage, now
        stage.now, stage.total, stage.note = now, step.total, step.note
        if step.layer is not None:
            stage.errors.append(step.layer.relative_error)
            where = f"block {step.layer.block}, {step.layer.name}"
            stage.layer = f"{where}: relative error {step.layer.relative_error:.5f}"
            return before
        stage.done = step.done
        if step.note == RESTORED:  # costs nothing, and says nothing of the rest
            stage.restored, stage.begun, stage.note = step.done, now, ""
            self.resumed = step.done
        return before

    def _begins(self, step: Progress, stage: Stage) -> bool:
        """Whether a step is of another stage, or of the same on the next text."""
        return stage.name != step.stage or (step.layer is None and step.done < stage.done)


def clock(seconds: float) -> str:
    """Return minutes and seconds, with hours where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Lines:
    """Where nobody watches: a line a block, a tenth, or a stage.

    Args:
        say: Takes a line.
        every_layer: A line a layer, too.
    """

    def __init__(self, say: Callable[[str], object], *, every_layer: bool = False) -> None:
        self._say, self._watch, self._every_layer = say, Watch(), every_layer

    def __call__(self, step: Progress) -> None:
        """Take a step."""
        self._watch.take(step)
        stage = self._watch.stage
        if step.layer is not None and stage is not None and self._every_layer:
            self._say(f"{step.stage}: {stage.layer}, {step.layer.seconds:.1f} s")
        if stage is None or step.layer is not None or step.note == RESTORED:
            return
        tell_resumed(self._watch, self._say)
        tenth = step.note and step.done % max(step.total // 10, 1) == 0  # of what has hundreds of steps
        if step.stage.endswith("blocks") or tenth or step.done == step.total:
            parts = [clock(stage.seconds), stage.note, stage.error]
            left = f"{clock(stage.left)} left" if stage.left and step.stage.endswith("blocks") else ""
            self._say(f"{step.stage}: {step.done} of {step.total} ({', '.join(filter(None, [*parts, left]))})")


def tell_resumed(watch: Watch, say: Callable[[str], object]) -> None:
    """Say once that blocks were taken over from an earlier process."""
    if watch.resumed is not None:
        say(f"resumed at block {watch.resumed}")
        watch.resumed = None


class Screen:
    """The live part of a terminal: the stage that is going on, with a bar; finished ones stand above it."""

    def __init__(self, console: "Console") -> None:
        from rich.live import Live

        self._console, self._watch = console, Watch()
        self._begun = time.monotonic()
        self._live = Live(console=console, refresh_per_second=2, transient=True, get_renderable=self.shown)

    def __call__(self, step: Progress) -> None:
        """Take a step."""
        ended = self._watch.take(step)
        if ended is not None:
            self._end(ended)
        if step.note != RESTORED:
            tell_resumed(self._watch, self._print)
        self._live.refresh()

    @contextmanager
    def on(self) -> "Iterator[Screen]":
        """Show it inside of this context."""
        with self._live:
            yield self
            if self._watch.stage is not None:
                self._end(self._watch.stage)

    def _end(self, stage: Stage) -> None:
        parts = [clock(stage.seconds), stage.error or stage.note]
        whole = "" if stage.done >= stage.total else f", {stage.done} of {stage.total}"
        self._print(f"{stage.name}{whole}: {', '.join(filter(None, parts))}")

    def _print(self, text: str) -> None:
        self._console.print(printable(text), markup=False, highlight=False)

    def shown(self) -> "Group":
        """Two lines: the bar with times, and the last layer with the memory in use."""
        from rich.console import Group
        from rich.text import Text

        stage = self._watch.stage
        if stage is None:  # libraries are imported, the model is opened, text is read
            return Group(Text(f"starting {clock(time.monotonic() - self._begun)}"))
        width = BAR if self._console.width >= NARROW else 0
        full = round(width * stage.done / max(stage.total, 1))
        left = "" if stage.left is None else f", {clock(stage.left)} left"
        spent = clock(time.monotonic() - stage.begun)
        bar = Text.assemble((("━" * full), "green"), (("━" * (width - full)), "bright_black"))
        counts = f" {stage.done}/{stage.total} {spent}{left}"
        room = max(self._console.width - width - len(counts) - 2, 8)
        name = Text(printable(stage.name), no_wrap=True)
        name.truncate(room, overflow="ellipsis")
        detail = ", ".join(filter(None, (stage.layer or stage.note, stage.error, f"memory {human_bytes(memory())}")))
        second = Text(printable(detail), style="bright_black", no_wrap=True, overflow="ellipsis")
        second.truncate(max(self._console.width - 1, 8), overflow="ellipsis")
        return Group(Text.assemble(name, " ", bar, counts), second)


def memory() -> int:
    """Return the bytes of main memory that this process holds."""
    import psutil

    return int(psutil.Process(os.getpid()).memory_info().rss)


def can_watch(console: "Console") -> bool:
    """Whether something that changes can be shown: on a terminal, or in a notebook that has widgets."""
    if console.is_jupyter:
        return importlib.util.find_spec("ipywidgets") is not None
    return console.is_terminal and not console.is_dumb_terminal


@contextmanager
def watched(notify: Notify | None) -> Iterator[Notify]:
    """Give the function to notify: the caller's own, or one that shows the run where it can be seen.

    Args:
        notify: The caller's; None for a display on a terminal or in a notebook, and for nothing elsewhere.
    """
    log = Lines(LOG.info)
    if notify is not None:
        own = notify

        def both(step: Progress) -> None:
            log(step)
            own(step)

        yield both
        return
    from rich.console import Console

    console = Console(stderr=True)
    if not can_watch(console):
        yield log
        return
    with Screen(console).on() as screen:

        def shown(step: Progress) -> None:
            log(step)
            screen(step)

        yield shown
