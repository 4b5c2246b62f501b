"""The two kinds of errors that sparlow raises on purpose. Any other exception is a bug."""

import errno
import re
from collections.abc import Iterator, Sequence
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
        if is_out_of_memory(error):  # no fault of theirs
            raise
        raise InputError(f"{what}: {first_line(error).rstrip('.')}.") from error


def reason(error: Exception) -> str:
    """Return why a file cannot be used, without its path, which the sentence names already; no full stop."""
    return (getattr(error, "strerror", None) or first_line(error)).rstrip(".")


# What the messages of allocators and libraries have in common.
_NO_MEMORY = re.compile(
    r"out[ _]of[ _](device[ _]|host[ _])?memory|(can't|cannot|unable to|failed to) allocate( memory)?|not enough memory"
    r"|bad_?alloc|_ALLOC_FAILED|ALLOCATION_FAILED|MAGMA_ERR_(HOST|DEVICE)_ALLOC|memory allocation failed"
    r"|failed to (cuda )?(host )?[mc]?alloc|cudaErrorMemoryAllocation|INSUFFICIENT_RESOURCES|ERROR_OUT_OF_RESOURCES"
    r"|invalid buffer size: \d"  # of Metal, above what it gives to one tensor
    r"|failed to map segment from shared object(?!: (operation not permitted|permission))"  # as a library is loaded
    r"|can't start new thread"  # there is no room for its stack
    r"|cublas(Lt)?Create|cusolverDnCreate",  # these fail for no other reason
    re.IGNORECASE,
)
_ON_HOST = re.compile(
    r"CPUAllocator|Cannot allocate memory|bad_?alloc|MemoryError|shared object|new thread|of[ _]host[ _]memory"
    r"|HOST_ALLOC",
    re.IGNORECASE,
)
# Of libraries in Rust and C, which raise classes of their own, or Exception itself.
_FOREIGN = ("SafetensorError", "ZstdError", "Exception")
TO_RUN = "Reduce --samples or --seqlen, or choose another --device. The same command resumes an unfinished run."


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or the one it came from, says that memory ran out: on the CPU, in CUDA or its libraries."""
    if isinstance(error, RunError):  # which has said what to do
        return False
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    telling = isinstance(error, RuntimeError | ImportError | OSError) or type(error).__name__ in _FOREIGN
    if telling and says_out_of_memory(str(error)):
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)


def says_out_of_memory(text: str) -> bool:
    """Whether what some library has written says that memory ran out."""
    return _NO_MEMORY.search(text) is not None


def out_of_memory(error: BaseException, options: Sequence[str] = (), advice: str = TO_RUN) -> str:
    """Say that memory ran out, and what to do.

    Args:
        error: What was raised.
        options: Some that are known to need less.
        advice: What to do where none are known; by default to one who compresses.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip() or type(error).__name__
    parts = [part.strip() for part in re.split(r"\n|\. ", text)]
    cause = next((part for part in parts if _NO_MEMORY.search(part)), parts[0]).rstrip(".")
    on_host = isinstance(error, MemoryError | OSError) or _ON_HOST.search(text)
    what = "There is too little main memory" if on_host else "The accelerator has too little memory"
    if options:
        advice = f"Much less is needed with {' or '.join(options)}. The same command resumes an unfinished run."
    return f"{what} ({cause}). {advice}"


def first_line(error: Exception) -> str:
    """Return the first line of what an exception says, or its type's name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
