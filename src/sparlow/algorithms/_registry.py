"""What an algorithm is, and where to find one by name. The signature of the function is its configuration."""

import difflib
import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from torch import Tensor

from sparlow.algorithms._results import Pruned
from sparlow.errors import InputError
from sparlow.linalg.gram import Gram
from sparlow.linalg.patterns import Pattern

Pruner = Callable[[Tensor, Gram, Pattern], Tensor | Pruned]
Positive = Annotated[float, "above 0"]  # annotations for options; plain float, int, bool, str and Literal do as well
Count = Annotated[int, "at least 1"]
_BOUNDS: dict[str, Callable[[float], bool]] = {"above 0": lambda v: v > 0, "at least 1": lambda v: v >= 1}
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Option:
    """One keyword-only parameter of an algorithm's function."""

    name: str
    default: Any
    annotation: Any

    @property
    def shown_default(self) -> str:
        """The default as a user would type it."""
        return _name_of(self.default) if callable(self.default) else str(self.default)

    @property
    def choices(self) -> str:
        """What may be given: a type's name and bound, or the words of a Literal."""
        if typing.get_origin(self.annotation) is Literal:
            return " | ".join(str(word) for word in typing.get_args(self.annotation))
        if self.annotation == Pruner:  # get_type_hints rebuilds it, so it is equal and not the same
            return "the name of a pruner"
        if typing.get_origin(self.annotation) is Annotated:
            kind, bound = typing.get_args(self.annotation)
            return f"{kind.__name__} {bound}"
        return str(getattr(self.annotation, "__name__", self.annotation))

    def parse(self, value: object) -> Any:  # noqa: ANN401 - options have many types
        """Turn a value typed by a user or read from TOML into what the function expects; InputError if it is not."""
        try:
            return _parse(self.annotation, value)
        except (TypeError, ValueError, OverflowError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"Option {self.name}={value!r} is not usable: expected {self.choices}.") from None


def _parse(annotation: Any, value: object) -> Any:  # noqa: ANN401 - options have many types
    if annotation == Pruner:
        algorithm, implied = find(str(value))
        if algorithm.kind != "pruner":
            raise ValueError
        return functools.partial(algorithm.function, **implied) if implied else algorithm.function
    if typing.get_origin(annotation) is Literal:
        return {str(word): word for word in typing.get_args(annotation)}[_one_of(value, typing.get_args(annotation))]
    if annotation is bool:
        return _one_of(str(value).lower(), ("true", "false")) == "true"
    if annotation is str:
        return str(value)
    kind, bound = typing.get_args(annotation) if typing.get_origin(annotation) is Annotated else (annotation, None)
    parsed = kind(value)
    rounded = isinstance(value, float) and parsed != value  # 1.5 for a whole number; NaN for anything
    if isinstance(value, bool) or rounded or not math.isfinite(parsed) or not (bound is None or _BOUNDS[bound](parsed)):
        raise ValueError
    return parsed


def _one_of(value: object, words: typing.Iterable[object]) -> str:
    if str(value) not in map(str, words):
        raise ValueError
    return str(value)


@dataclass(frozen=True, slots=True)
class Algorithm:
    """A registered function with all that the command line, the docs and the tests need to know of it."""

    name: str
    kind: Literal["pruner", "decomposer"]
    function: Callable[..., Any]
    aliases: Mapping[str, Mapping[str, object]]

    @property
    def summary(self) -> str:
        """The first sentence of the function's docstring."""
        return (inspect.getdoc(self.function) or "").split("\n", 1)[0]

    @property
    def options(self) -> dict[str, Option]:
        """The keyword-only parameters of the function, in order."""
        hints = typing.get_type_hints(self.function, include_extras=True)
        parameters = inspect.signature(self.function).parameters.values()
        return {
            p.name: Option(p.name, p.default, hints[p.name])
            for p in parameters
            if p.kind is inspect.Parameter.KEYWORD_ONLY
        }

    def plain_options(self, given: Mapping[str, object]) -> dict[str, Any]:
        """The options as a file holds them: numbers as numbers, pruners by name; checked as by ``parse_options``."""
        parsed = self.parse_options(given)
        return {name: str(given[name]) if callable(value) else value for name, value in parsed.items()}

    def parse_options(self, given: Mapping[str, object]) -> dict[str, Any]:
        """Check option names and values against the signature; InputError names what is wrong and what there is."""
        known = self.options
        for name in given:
            if name not in known:
                raise InputError(f"{self.name} has no option {name!r}{_suggest(name, known)}.")
        return {name: known[name].parse(value) for name, value in given.items()}


_ALGORITHMS: dict[str, Algorithm] = {}


def pruner(name: str, *, aliases: Mapping[str, Mapping[str, object]] = types.MappingProxyType({})) -> Callable[[F], F]:
    """Register a function ``(W, gram, pattern, *, options) -> S`` under ``name``; or ``-> Pruned(S, stats)``.

    Args:
        name: As typed on the command line.
        aliases: Further names, each with the options it stands for.
    """
    return _registrar(name, "pruner", aliases)


def decomposer(
    name: str, *, aliases: Mapping[str, Mapping[str, object]] = types.MappingProxyType({})
) -> Callable[[F], F]:
    """Register a function ``(W, gram, pattern, rank, *, options) -> Decomposition``; see ``pruner``."""
    return _registrar(name, "decomposer", aliases)


def algorithms() -> tuple[Algorithm, ...]:
    """All registered algorithms, pruners first, by name."""
    return tuple(sorted(_ALGORITHMS.values(), key=lambda a: (a.kind != "pruner", a.name)))


def variants() -> tuple[str, ...]:
    """Every algorithm once, for a comparison; one whose aliases imply options stands under each of these instead."""
    return tuple(
        name for a in algorithms() for name in ([n for n, implied in a.aliases.items() if implied] or [a.name])
    )


def find(name: str) -> tuple[Algorithm, dict[str, object]]:
    """Look up a name or an alias; return the algorithm and the options that an alias stands for.

    Raises InputError with the nearest name and the whole list if there is none.
    """
    if name in _ALGORITHMS:
        return _ALGORITHMS[name], {}
    for algorithm in _ALGORITHMS.values():
        if name in algorithm.aliases:
            return algorithm, dict(algorithm.aliases[name])
    names = [n for a in _ALGORITHMS.values() for n in (a.name, *a.aliases)]
    raise InputError(f"There is no algorithm {name!r}{_suggest(name, names)}.")


def _registrar(
    name: str, kind: Literal["pruner", "decomposer"], aliases: Mapping[str, Mapping[str, object]]
) -> Callable[[F], F]:
    def register(function: F) -> F:
        taken = {n for a in _ALGORITHMS.values() for n in (a.name, *a.aliases)}
        for new in (name, *aliases):
            if new in taken:
                raise ValueError(f"two algorithms are called {new!r}")
        _ALGORITHMS[name] = Algorithm(name, kind, function, aliases)
        return function

    return register


def _name_of(function: object) -> str:
    return next((a.name for a in _ALGORITHMS.values() if a.function is function), str(function))


def _suggest(word: str, known: typing.Iterable[str]) -> str:
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1)
    meant = f"; did you mean {near[0]!r}?" if near else ";"
    return f"{meant} There is: {', '.join(known)}" if known else " (it takes none)"
