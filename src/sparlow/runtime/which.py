"""Which kernel multiplies packed layers on this machine, and where it comes from."""

import os
from dataclasses import dataclass
from pathlib import Path

from sparlow.runtime.build import NoKernelError, library

PATH = "SPARLOW_KERNEL"  # names the instruction set in the environment


@dataclass(frozen=True)
class Kernel:
    """The kernel of this machine; ``str`` says it in a few words.

    Attributes:
        path: The instruction set that is used, one of ``build.PATHS``; empty if there is none.
        origin: ``prebuilt`` in the package, ``compiled`` into the cache, or ``none``.
        file: The library, if there is one.
        why: Why there is none, or no such path.
    """

    path: str
    origin: str
    file: Path | None = None
    why: str = ""

    def __str__(self) -> str:
        if not self.path:
            return f"none: {self.why}"
        return f"{self.path}, {'prebuilt' if self.origin == 'prebuilt' else f'compiled into {self.file}'}"


def kernel() -> Kernel:
    """Return which kernel is used here and where it lies, or why there is none; it is compiled if it has not been."""
    try:
        found = library()
    except NoKernelError as problem:
        return Kernel("", "none", why=str(problem))
    asked = os.environ.get(PATH) or found.paths[-1]
    if asked in found.paths:
        return Kernel(asked, found.origin, found.file)
    there = ", ".join(found.paths)
    why = f"There is no kernel for {asked} on this processor. Choose one of {there}."
    return Kernel("", found.origin, found.file, why)
