"""What an algorithm is, and where to find one by name. The signature of the function is its configuration."""

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from torch import Tensor

from sparlow.algorithms._results import Pruned
from sparlow.errors import InputError
from sparlow.linalg.gram import Gram
from sparlow.linalg.patterns import Pattern
from sparlow.schema import ABOVE_0, Named, Option, at_least, options_of, parse_options, unknown

Positive = Annotated[float, ABOVE_0]  # annotations for options; plain float, int, bool, str and Literal do as well
Count = Annotated[int, at_least(1)]
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Algorithm:
    """A registered function, with what the command line, the docs and the tests need to know about it."""

    name: str
    kind: Literal["pruner", "decomposer"]
    function: Callable[..., Any]
    aliases: Mapping[str, Mapping[str, object]]
    usual: bool = False
    by_rows: bool = False  # whether several processes can each solve some rows, see ``linalg.shared_rows``

    @property
    def summary(self) -> str:
        """The first sentence of the function's docstring."""
        return (inspect.getdoc(self.function) or "").split("\n", 1)[0]

    @property
    def options(self) -> dict[str, Option]:
        """The keyword-only parameters of the function, in order."""
        return dict(options_of(self.function))

    @property
    def takes_grid(self) -> bool:
        """Whether the function has a parameter ``grid`` and puts the values of S on it itself."""
        return "grid" in inspect.signature(self.function).parameters

    def divides_rows(self, options: Mapping[str, Any]) -> bool:
        """Whether several processes can each solve some rows of a weight, with these parsed options.

        A pruner that does a part of the work must be able to, as well.
        """
        chosen = [getattr(value, "func", value) for value in options.values() if callable(value)]
        return self.by_rows and all(a.by_rows for a in _ALGORITHMS.values() if a.function in chosen)

    def plain_options(self, given: Mapping[str, object]) -> dict[str, Any]:
        """The options as a file holds them: numbers as numbers, pruners by name; checked as by ``parse_options``."""
        parsed = self.parse_options(given)
        return {name: str(given[name]) if callable(value) else value for name, value in parsed.items()}

    def parse_options(self, given: Mapping[str, object]) -> dict[str, Any]:
        """Check option names and values against the signature; InputError names what is wrong and what there is."""
        return parse_options(self.name, self.options, given)


_ALGORITHMS: dict[str, Algorithm] = {}


def pruner(
    name: str,
    *,
    aliases: Mapping[str, Mapping[str, object]] = types.MappingProxyType({}),
    usual: bool = False,
    by_rows: bool = False,
) -> Callable[[F], F]:
    """Register a function ``(W, gram, pattern, *, options) -> S`` under ``name``; or ``-> Pruned(S, stats)``.

    A function that can put the values of S on a grid itself takes ``grid: GridTarget | None = None`` after the others,
    and returns ``values`` if it did. For any other, the grid is fitted to what it found.

    Args:
        name: As typed on the command line.
        aliases: Further names, each with the options it stands for.
        usual: Whether a comparison that names no methods has it, because it is well known and quick.
        by_rows: Where a pattern chooses within rows, several processes can each solve some of a weight: the function
            treats rows alone, and whatever it adds up over them goes through ``linalg.shared_rows``.
    """
    return _registrar(name, "pruner", aliases, usual=usual, by_rows=by_rows)


def decomposer(
    name: str,
    *,
    aliases: Mapping[str, Mapping[str, object]] = types.MappingProxyType({}),
    usual: bool = False,
    by_rows: bool = False,
) -> Callable[[F], F]:
    """Register a function ``(W, gram, pattern, rank, *, options) -> Decomposition``; see ``pruner``."""
    return _registrar(name, "decomposer", aliases, usual=usual, by_rows=by_rows)


def algorithms() -> tuple[Algorithm, ...]:
    """All registered algorithms, pruners first, by name."""
    return tuple(sorted(_ALGORITHMS.values(), key=lambda a: (a.kind != "pruner", a.name)))


def variants() -> tuple[str, ...]:
    """Return the algorithms to compare; one whose aliases imply options is listed by these aliases instead."""
    return tuple(
        name for a in algorithms() for name in ([n for n, implied in a.aliases.items() if implied] or [a.name])
    )


def usual() -> tuple[str, ...]:
    """Return the algorithms of a comparison that names none."""
    return tuple(algorithm.name for algorithm in algorithms() if algorithm.usual)


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
    raise InputError(unknown(f"There is no algorithm {name!r}", name, sorted(names)))


def _registrar(
    name: str,
    kind: Literal["pruner", "decomposer"],
    aliases: Mapping[str, Mapping[str, object]],
    *,
    usual: bool,
    by_rows: bool,
) -> Callable[[F], F]:
    def register(function: F) -> F:
        taken = {n for a in _ALGORITHMS.values() for n in (a.name, *a.aliases)}
        for new in (name, *aliases):
            if new in taken:
                raise ValueError(f"Two algorithms are called {new!r}.")
        _ALGORITHMS[name] = Algorithm(name, kind, function, aliases, usual, by_rows)
        return function

    return register


def _pruner_named(name: str) -> Callable[..., Any]:
    algorithm, implied = find(name)
    if algorithm.kind != "pruner":
        raise ValueError
    return functools.partial(algorithm.function, **implied) if implied else algorithm.function


def _name_of(function: object) -> str:
    return next((a.name for a in _ALGORITHMS.values() if a.function is function), str(function))


Pruner = Annotated[
    Callable[[Tensor, Gram, Pattern], Tensor | Pruned],
    Named("the name of a pruner", find=_pruner_named, name_of=_name_of),
]
