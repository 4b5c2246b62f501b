"""Ctrl-C: remember the signal, whatever happens to the exception, and say how to resume."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from sparlow.cli import display

INTERRUPTED = 130  # the exit code of a command that Ctrl-C has ended


@contextmanager
def noted(came: list[int]) -> Iterator[None]:
    """Within this context, note each Ctrl-C in ``came``; it raises KeyboardInterrupt as ever.

    Compiled code that is interrupted may swallow the exception and raise one of its own.
    """

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        signal.default_int_handler(number, frame)

    ours = threading.current_thread() is threading.main_thread()  # no other may handle signals
    before = signal.signal(signal.SIGINT, note) if ours else None
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, before)


@contextmanager
def resumable(unit: str = "finished block") -> Iterator[None]:
    """Say how to resume after Ctrl-C, which typer then turns into the exit code 130."""
    came: list[int] = []
    try:
        with noted(came):
            yield
    except (KeyboardInterrupt, Exception) as error:
        if not came and not isinstance(error, KeyboardInterrupt):
            raise
        display.err.print(f"stopped: the same command resumes the run from its last {unit}")
        raise KeyboardInterrupt from error
