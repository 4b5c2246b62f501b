"""The two kinds of errors that sparlow raises on purpose. Any other exception is a bug."""

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """What the caller gave cannot be used; one sentence says what to do. The command line exits with 2."""


class RunError(RuntimeError):
    """A run that started well could not go on; one sentence says where and why. The command line exits with 1."""


@contextmanager
def as_input_error(what: str) -> Iterator[None]:
    """Turn whatever is raised by reading foreign files into an InputError that begins with ``what``."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # foreign files make transformers, tokenizers and gguf raise anything, even Exception
        raise InputError(f"{what}: {first_line(error).rstrip('.')}.") from error


def reason(error: Exception) -> str:
    """Return why a file cannot be used, without its path, which the sentence names already; no full stop."""
    return (getattr(error, "strerror", None) or first_line(error)).rstrip(".")


def first_line(error: Exception) -> str:
    """Return the first line of what an exception says, or its type's name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
