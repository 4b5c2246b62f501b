"""Ctrl-C: remember the signal, whatever happens to the exception, and say how to resume."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from sparlow.cli import display


@contextmanager
def resumable(unit: str = "finished block") -> Iterator[None]:
    """Say how to resume after Ctrl-C, which typer then turns into the exit code 130.

    Compiled code that is interrupted may swallow the exception and raise one of its own, so the signal itself is noted.
    """
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        signal.default_int_handler(number, frame)

    ours = threading.current_thread() is threading.main_thread()  # no other may handle signals
    before = signal.signal(signal.SIGINT, note) if ours else None
    try:
        yield
    except (KeyboardInterrupt, Exception) as error:
        if not came and not isinstance(error, KeyboardInterrupt):
            raise
        display.err.print(f"stopped: the same command resumes the run from its last {unit}")
        raise KeyboardInterrupt from error
    finally:
        if ours:
            signal.signal(signal.SIGINT, before)
