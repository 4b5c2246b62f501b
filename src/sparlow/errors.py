"""The two ways sparlow fails on purpose; everything else is a bug."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

# Control and direction characters but for tabs and line ends: in a terminal they could erase or forge what is shown.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")


def printable(text: str) -> str:
    """Return a text that cannot do anything to a terminal: what is no character to be seen becomes a mark."""
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


class InputError(ValueError):
    """What the caller gave cannot be used; one sentence says what to do. The command line exits with 2."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))  # it may quote a file of a stranger


class RunError(RuntimeError):
    """A run that started well could not go on; one sentence says where and why. The command line exits with 1."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


@contextmanager
def as_input_error(what: str) -> Iterator[None]:
    """Turn whatever is raised by reading foreign files into an InputError that begins with ``what``."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # foreign files make transformers, tokenizers and gguf raise anything, even Exception
        raise InputError(f"{what}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """Return the first line of what an exception says, or its type's name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
