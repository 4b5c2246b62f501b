"""A sign of life on a terminal while libraries are imported and a model is opened, until there is something to say."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner

_shown: list[Live] = []


def begin(console: Console) -> None:
    """Show that something goes on, where that can be watched; whatever is printed next ends it."""
    if console.is_terminal and not console.is_dumb_terminal:
        sign = Live(Spinner("dots", "starting"), console=console, transient=True, refresh_per_second=4)
        sign.start(refresh=True)
        _shown.append(sign)


@contextmanager
def ended() -> Iterator[None]:
    """Show it no longer behind this context, however that is left."""
    try:
        yield
    finally:
        end()


def end() -> None:
    """Show it no longer, and leave no trace."""
    while _shown:
        _shown.pop().stop()
