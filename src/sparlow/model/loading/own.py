"""Whether sparlow itself is opening a model: to compress, train or evaluate it, layers must be in floats then."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_own: ContextVar[bool] = ContextVar("own", default=False)


def is_own() -> bool:
    """Whether what is being opened is opened by sparlow for its own use, whatever mode a user has chosen."""
    return _own.get()


@contextmanager
def own_use() -> Iterator[None]:
    """Within this context, models are opened for sparlow's own use."""
    token = _own.set(True)
    try:
        yield
    finally:
        _own.reset(token)
