"""A recipe: everything that decides the result of a compression, as one frozen record and one TOML file."""

import dataclasses
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import tomli_w

from sparlow.algorithms import Algorithm, find
from sparlow.errors import InputError
from sparlow.linalg.patterns import Pattern, parse_pattern

GIVEN_WINDOWS = "windows"  # what a recipe calls a calibration by token windows given directly
DEFAULT_RANK = 64  # of methods with a low-rank part: 2.4 % of the linear weights of an 8B Llama


@dataclass(frozen=True)
class Recipe:
    """What is done to every linear layer, and on which text.

    Attributes:
        algorithm: A name printed by ``sparlow algorithms``.
        options: The algorithm's own options; names and values are checked against its signature.
        pattern: ``"2:4"`` (N:M) or ``"0.5"`` (the fraction removed).
        rank: Rank of the low-rank part; None stands for 64, or 0 if the algorithm only prunes.
        calibration: Name of a corpus, a file or a hub data set; "windows" stands for token windows given directly.
        samples: Calibration windows.
        seqlen: Tokens in a window.
        seed: Of the choice of windows.
        damping: Times mean(diag H), added to the diagonal of H.
        relative_damping: Times diag(H), added likewise.
        dtype: Of the model's weights: auto (as stored), float32, bfloat16 or float16.
    """

    algorithm: str = "3basil"
    options: Mapping[str, Any] = field(default_factory=dict)
    pattern: str = "2:4"
    rank: int | None = None
    calibration: str = "c4"
    samples: int = 128
    seqlen: int = 2048
    seed: int = 0
    damping: float = 0.005
    relative_damping: float = 0.005
    dtype: str = "auto"

    def __post_init__(self) -> None:
        for f in fields(self):
            _check_type(f.name, getattr(self, f.name))
        algorithm, implied = find(self.algorithm)
        algorithm.parse_options({**implied, **self.options})
        object.__setattr__(self, "options", algorithm.plain_options(self.options))
        parse_pattern(self.pattern)
        for name in ("samples", "seqlen"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}.")
        for name in ("damping", "relative_damping"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} must be a number that is not negative, not {getattr(self, name)}.")

    @property
    def found_algorithm(self) -> Algorithm:
        """The registered algorithm behind the name or alias."""
        return find(self.algorithm)[0]

    @property
    def parsed_options(self) -> dict[str, Any]:
        """The options as the algorithm's function takes them, those of an alias included."""
        algorithm, implied = find(self.algorithm)
        return algorithm.parse_options({**implied, **self.options})

    @property
    def parsed_pattern(self) -> Pattern:
        """The pattern as an object."""
        return parse_pattern(self.pattern)

    @property
    def used_rank(self) -> int:
        """The rank asked for, or the default of the algorithm's kind."""
        if self.rank is not None:
            return self.rank
        return 0 if self.found_algorithm.kind == "pruner" else DEFAULT_RANK

    def to_dict(self) -> dict[str, Any]:
        """All fields, in order; what is None is left out, for TOML has no null."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) is not None}

    def to_toml(self) -> str:
        """The recipe as a file that ``from_toml`` reads back to an equal recipe."""
        return tomli_w.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Recipe":
        """Check names and types, and build the recipe; InputError says what is wrong."""
        known = [f.name for f in fields(cls)]
        for name, value in data.items():
            if name not in known:
                raise InputError(f"A recipe has no field {name!r}; there is: {', '.join(known)}.")
            _check_type(name, value)
        values: dict[str, Any] = {n: float(v) if float in _TYPES[n] else v for n, v in data.items()}
        return cls(**values)

    @classmethod
    def from_toml(cls, text: str) -> "Recipe":
        """Read what ``to_toml`` writes; fields left out take their defaults."""
        try:
            return cls.from_dict(tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            raise InputError(f"The recipe is not valid TOML: {error}.") from None

    @classmethod
    def from_file(cls, path: str | Path) -> "Recipe":
        """Read a TOML file."""
        try:
            return cls.from_toml(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"The recipe {path} cannot be read: {error}.") from None

    def changed(self, **changes: Any) -> "Recipe":  # noqa: ANN401 - fields have many types
        """Return a copy with some fields replaced."""
        return dataclasses.replace(self, **changes)


_TYPES: dict[str, tuple[type, ...]] = {
    "algorithm": (str,),
    "options": (Mapping,),
    "pattern": (str,),
    "rank": (int,),
    "calibration": (str,),
    "samples": (int,),
    "seqlen": (int,),
    "seed": (int,),
    "damping": (float, int),
    "relative_damping": (float, int),
    "dtype": (str,),
}


def _check_type(name: str, value: object) -> None:
    expected = _TYPES[name]
    absent = name == "rank" and value is None
    if not absent and (not isinstance(value, expected) or isinstance(value, bool)):
        raise InputError(f"Field {name} of a recipe must be {_spoken(expected)}, not {value!r}.")


def _plain(value: Any) -> Any:  # noqa: ANN401 - fields have many types
    return dict(value) if isinstance(value, Mapping) else value


def _spoken(types: tuple[type, ...]) -> str:
    names = {str: "text", int: "a whole number", float: "a number", Mapping: "a table"}
    return names[types[0]]
