"""The recipes that come with sparlow, by name: ``--recipe 3basil-16to32-r64``."""

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from sparlow.errors import InputError
from sparlow.schema import unknown

ABOUT = "about.toml"
_LIBRARY = files("sparlow.recipe") / "library"


@dataclass(frozen=True)
class Measured:
    """What a recipe gave.

    Attributes:
        model: With which.
        calibration: With which text, which may be shorter than the recipe's.
        text: That perplexity was measured on.
        dense: Perplexity of the dense model.
        perplexity: Of the result.
        bits: A compressed weight takes.
        source: The page or file that has the figure.
    """

    model: str
    calibration: str
    text: str
    dense: float
    perplexity: float
    bits: float
    source: str

    def __str__(self) -> str:
        """One line."""
        found = f"{self.text} {self.dense:.2f} → {self.perplexity:.2f} at {self.bits:.2f} bits"
        return f"{found} ({self.model}, {self.calibration})"


@dataclass(frozen=True)
class Packaged:
    """A recipe that comes with sparlow.

    Attributes:
        name: As ``--recipe`` takes it.
        summary: What it is for.
        measured: What it gave; None if that is not known.
    """

    name: str
    summary: str
    measured: Measured | None = None


@cache
def packaged() -> tuple[Packaged, ...]:
    """All of them, in the order of the list."""
    about: dict[str, dict[str, Any]] = tomllib.loads((_LIBRARY / ABOUT).read_text("utf-8"))
    return tuple(
        Packaged(name, row["summary"], Measured(**row["measured"]) if "measured" in row else None)
        for name, row in about.items()
    )


def is_name(given: str | Path) -> bool:
    """Whether what was given for a recipe is rather a name than the path of a file."""
    return isinstance(given, str | Path) and Path(given).name == str(given) and Path(given).suffix not in _FILES


_FILES = (".toml", ".yaml", ".yml", ".json", ".txt")


def text_of(name: str) -> str:
    """Return the text of the recipe of this name.

    Raises:
        InputError: There is none, and no file that is called so.
    """
    names = [one.name for one in packaged()]
    if name not in names:
        raise InputError(unknown(f"There is no file and no packaged recipe {name!r}", name, names))
    return (_LIBRARY / f"{name}.toml").read_text("utf-8")
