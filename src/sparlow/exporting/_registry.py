"""The forms in which a model can leave, by name. What one file registers is known to Python and to the command."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from sparlow.errors import InputError
from sparlow.exporting.stored import Stored
from sparlow.progress import Notify
from sparlow.schema import Option, options_of, parse_options, unknown


@dataclass
class Exported:
    """What an export has written.

    Attributes:
        form: Its name.
        out: The directory.
        bytes: Of all its files.
        notes: What was rounded or left behind, a sentence each.
        commands: With which other programs open it.
    """

    form: str
    out: Path
    bytes: int = 0
    notes: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Writer:
    """What writes a form. All that makes it impossible has been said before, by ``Form.prepare``.

    Attributes:
        write: Writes into an empty directory, and says what was written; ``out`` is set by the caller.
        bytes: That it will take, without what is small.
    """

    write: Callable[[Path, Notify], Exported]
    bytes: int


@dataclass(frozen=True, slots=True)
class Form:
    """A form that other programs read.

    Attributes:
        name: As typed.
        keeps: What of the compressed model is kept.
        loses: What is lost.
        opened_by: The programs.
        prepare: ``(stored, *, options) -> Writer``; raises InputError, with the reason, where the model cannot be
            expressed, before anything is written.
    """

    name: str
    keeps: str
    loses: str
    opened_by: tuple[str, ...]
    prepare: Callable[..., Writer]

    @property
    def summary(self) -> str:
        """The first sentence of the function's docstring."""
        return (inspect.getdoc(self.prepare) or "").split("\n", 1)[0]

    @property
    def options(self) -> dict[str, Option]:
        """The keyword-only parameters of the function, in order."""
        return dict(options_of(self.prepare))

    def parse_options(self, given: Mapping[str, object]) -> dict[str, Any]:
        """Check names and values of options against the signature; InputError names what is wrong and what there is."""
        return parse_options(f"The form {self.name}", self.options, given)


_FORMS: dict[str, Form] = {}


def form(
    name: str, *, keeps: str, loses: str, opened_by: tuple[str, ...]
) -> Callable[[Callable[..., Writer]], Callable[..., Writer]]:
    """Register a function ``(stored: Stored, *, options) -> Writer`` under ``name``; see ``Form``."""

    def register(function: Callable[..., Writer]) -> Callable[..., Writer]:
        if name in _FORMS:
            raise ValueError(f"Two forms are called {name!r}.")
        _FORMS[name] = Form(name, keeps, loses, opened_by, function)
        return function

    return register


def forms() -> tuple[Form, ...]:
    """All forms by name. Every module of this folder is imported for it, so that a new file is enough."""
    package = __package__ or "sparlow.exporting"
    for module in iter_modules(import_module(package).__path__):
        import_module(f"{package}.{module.name}")
    return tuple(sorted(_FORMS.values(), key=lambda one: one.name))


def find(name: str) -> Form:
    """Look up a form; InputError with the nearest name and the whole list if there is none."""
    known = {one.name: one for one in forms()}
    if name not in known:
        raise InputError(unknown(f"There is no form {name!r}", name, sorted(known)))
    return known[name]


__all__ = ["Exported", "Form", "Stored", "Writer", "find", "form", "forms"]
