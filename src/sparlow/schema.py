"""Options declared once, as annotations of a dataclass's fields or of a function's keyword-only parameters.

    samples: Annotated[int, Doc("Number of calibration windows."), at_least(1), Panel("Calibration")] = 128

Recipes, run options, fine-tuning and every algorithm are declared like this. What Python, TOML and the command line
may give, the help text, and the tables of docs/options.md all follow from the declaration. Adding an option is a line.
"""

import dataclasses
import difflib
import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from sparlow.errors import InputError

T = TypeVar("T")
LONGEST = 200  # characters of a value that an error repeats
LARGEST = 2**63  # whole numbers stay below, as torch's do


@dataclass(frozen=True, slots=True)
class Doc:
    """The meaning of an option in whole sentences, for help and docs."""

    text: str


@dataclass(frozen=True, slots=True)
class Panel:
    """The group in which help and docs show an option."""

    title: str


@dataclass(frozen=True, slots=True)
class Unset:
    """What None stands for, as help and docs show it in place of a default."""

    text: str


@dataclass(frozen=True, slots=True)
class Choices:
    """The allowed words; ``noun`` names them in an error."""

    noun: str
    words: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Bound:
    """A condition on a number; ``text`` completes the sentence "… must be"."""

    text: str
    holds: Callable[[float], bool]


@dataclass(frozen=True, slots=True)
class Named:
    """A value that is given by its name.

    Attributes:
        what: As in "expected the name of a pruner".
        find: From the name to the value; InputError or ValueError if there is none.
        name_of: And back.
    """

    what: str
    find: Callable[[str], Any]
    name_of: Callable[[Any], str]


@dataclass(frozen=True, slots=True)
class FileOnly:
    """Marks what the command line cannot give, or gives in a way of its own."""


@dataclass(frozen=True, slots=True)
class Needs:
    """Marks an option that has no effect unless another one, ``field``, has this ``value``; ``said`` is how to ask."""

    field: str
    value: Any
    said: str


def at_least(least: int) -> Bound:
    """The smallest number that may be given."""
    return Bound(f"at least {least}", lambda value: value >= least)


ABOVE_0 = Bound("above 0", lambda value: value > 0)
NOT_NEGATIVE = Bound("a number that is not negative", lambda value: value >= 0)
FRACTION = Bound("a fraction from 0 up to below 1", lambda value: 0 <= value < 1)


@dataclass(frozen=True, slots=True)
class Option:
    """One field of a dataclass or one keyword-only parameter of a function."""

    name: str
    default: Any
    annotation: Any

    @property
    def kind(self) -> Any:  # noqa: ANN401 - a class or a special form of typing
        """The annotation without its notes and without None."""
        return _unwrapped(self.annotation)[0]

    @property
    def optional(self) -> bool:
        """Whether None may be given."""
        return _unwrapped(self.annotation)[2]

    @property
    def repeatable(self) -> bool:
        """Whether it holds a list."""
        return _container(self.kind) in (list, tuple, Sequence)

    def note(self, of: type[T]) -> T | None:
        """The note of one kind in the annotation, if there is one."""
        return next((note for note in _unwrapped(self.annotation)[1] if isinstance(note, of)), None)

    @property
    def words(self) -> tuple[Any, ...]:
        """All that may be given, where that is a short list of words."""
        choices = self.note(Choices)
        if choices:
            return choices.words
        return typing.get_args(self.kind) if typing.get_origin(self.kind) is Literal else ()

    @property
    def shown_default(self) -> str:
        """The default as a user would type it."""
        named, unset = self.note(Named), self.note(Unset)
        if named:
            return named.name_of(self.default)
        if self.default is None and unset:
            return unset.text
        return ",".join(map(str, self.default)) if self.repeatable else str(self.default)

    @property
    def choices(self) -> str:
        """What may be given: a type's name and bound, or the words to choose from."""
        named, bound = self.note(Named), self.note(Bound)
        if named:
            return named.what
        if self.words:
            return " | ".join(map(str, self.words))
        name = getattr(self.kind, "__name__", str(self.kind))
        return f"{name} {bound.text}" if bound else name

    def parse(self, value: object) -> Any:  # noqa: ANN401 - options have many types
        """Turn what a user typed as key=value, or what TOML holds, into the value; InputError if it is not one."""
        try:
            return self._parsed(value)
        except InputError:
            raise
        except (TypeError, ValueError, OverflowError):
            raise InputError(f"Option {self.name}={shown(value)} is not usable: expected {self.choices}.") from None

    def _parsed(self, value: object) -> Any:  # noqa: ANN401 - options have many types
        named = self.note(Named)
        if named:
            return named.find(str(value))
        if self.words:
            return {str(word): word for word in self.words}[_one_of(value, self.words)]
        if self.kind is bool:
            return _one_of(str(value).lower(), ("true", "false")) == "true"
        if self.kind is str:
            return str(value)
        number = self.kind(value)
        rounded = isinstance(value, float) and number != value  # 1.5 for a whole number; NaN for anything
        if isinstance(value, bool) or rounded or not self._holds(number):
            raise ValueError
        return number

    def _holds(self, number: float) -> bool:
        bound = self.note(Bound)
        possible = abs(number) < LARGEST if self.kind is int else math.isfinite(number)
        return possible and (bound is None or bound.holds(number))

    def check(self, value: object, owner: str) -> Any:  # noqa: ANN401 - options have many types
        """Return a value that a file or Python gives, a list as a tuple and a whole number as a float where one is due.

        Args:
            value: What was given.
            owner: What the option belongs to, such as "a recipe".

        Raises:
            InputError: It has another type, is out of bounds, or is none of the words to choose from.
        """
        if value is None and self.optional:
            return None
        if not self._has_type(value):
            must = _SPOKEN[_container(self.kind)]
            raise InputError(f"Field {self.name} of {owner} must be {must}, not {shown(value)}.")
        choices = self.note(Choices)
        if choices and value not in choices.words:
            raise InputError(unknown(f"There is no {choices.noun} {shown(value)}", str(value), choices.words))
        if isinstance(value, int | float) and not isinstance(value, bool):
            return self._check_number(value)
        return tuple(value) if self.repeatable and isinstance(value, Sequence) else value

    def _has_type(self, value: object) -> bool:
        container = _container(self.kind)
        if self.repeatable:
            items = value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else None
            of_text = str in typing.get_args(self.kind)
            return items is not None and not (of_text and not all(isinstance(item, str) for item in items))
        kinds: Any = (int, float) if container is float else (str, Path) if container is Path else container
        return isinstance(value, kinds) and isinstance(value, bool) == (container is bool)

    def _check_number(self, value: float) -> float:
        try:
            number: float = self.kind(value)
            if self._holds(number):
                return number
        except OverflowError:  # more digits than a float can count
            number = math.inf
        bound = self.note(Bound)
        must = bound.text if bound else "a number"
        if isinstance(number, float) and not math.isfinite(number):
            must += " and finite"
        elif abs(number) >= LARGEST and self.kind is int:
            must += " and of at most 18 digits"
        raise InputError(f"{self.name} must be {must}, not {shown(value)}.")


_SPOKEN: dict[Any, str] = {
    bool: "true or false",
    str: "text",
    int: "a whole number",
    float: "a number",
    Path: "a path",
    Mapping: "a table",
    Sequence: "a list",
    tuple: "a list",
    list: "a list",
}


def options_of(owner: Any) -> Mapping[str, Option]:  # noqa: ANN401 - a class or a function
    """The fields of a dataclass, or the keyword-only parameters of a function, in order."""
    return _read(owner)


@functools.cache
def _read(owner: Any) -> Mapping[str, Option]:  # noqa: ANN401 - the same
    hints = typing.get_type_hints(owner, include_extras=True)
    if dataclasses.is_dataclass(owner):
        return {f.name: Option(f.name, _default_of(f), hints[f.name]) for f in dataclasses.fields(owner)}
    parameters = [p for p in inspect.signature(owner).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    return {p.name: Option(p.name, p.default, hints[p.name]) for p in parameters}


def check_fields(record: Any, owner: str) -> None:  # noqa: ANN401 - any dataclass
    """Check every field of a frozen dataclass from its ``__post_init__``, and put the checked value in its place."""
    for name, option in options_of(type(record)).items():
        object.__setattr__(record, name, option.check(getattr(record, name), owner))


def require_known(given: Iterable[str], owner: Callable[..., Any], what: str) -> None:
    """Raise InputError, with the name that may have been meant, if ``owner`` lacks an option that is given."""
    known = options_of(owner)
    for name in given:
        if name not in known:
            raise InputError(unknown(f"{what} has no field {shown(name)}", name, known))


def idle(values: Mapping[str, Any], owner: type) -> dict[str, Needs]:
    """Of the options that need another one: those that do nothing beside these values, and what each would need."""
    notes = {name: option.note(Needs) for name, option in options_of(owner).items()}
    return {name: needs for name, needs in notes.items() if needs and values[needs.field] != needs.value}


def require_effect(given: Iterable[str], values: Mapping[str, Any], owner: type) -> None:
    """Raise InputError for the first of the options that are ``given``, if it does nothing beside these values."""
    without = idle(values, owner)
    for name in given:
        if name in without:
            option, said = f"--{name.replace('_', '-')}", without[name].said
            raise InputError(f"{option} has no effect without {said}. Add {said}, or leave {option} out.")


def pick(record: type[T], values: Mapping[str, Any]) -> T:
    """Build a dataclass from those of the ``values`` that are its fields."""
    return record(**{name: values[name] for name in options_of(record)})


def values_of(record: Any) -> dict[str, Any]:  # noqa: ANN401 - any dataclass
    """The fields of a dataclass by name, as they are."""
    return {name: getattr(record, name) for name in options_of(type(record))}


def documented(record: type[T]) -> type[T]:
    """Class decorator: append what each option means to the docstring of a dataclass."""
    docs = {name: option.note(Doc) for name, option in options_of(record).items()}
    lines = [f"    {name}: {doc.text}" for name, doc in docs.items() if doc]
    record.__doc__ = "\n".join([inspect.cleandoc(record.__doc__ or ""), "", "Attributes:", *lines])
    return record


def parse_options(owner: str, known: Mapping[str, Option], given: Mapping[str, object]) -> dict[str, Any]:
    """Return the values of options by name, checked.

    Args:
        owner: What takes them, as the beginning of a sentence.
        known: The options that there are.
        given: What was given for some of them.

    Raises:
        InputError: There is no such option, or a value is wrong; the sentence names what there is.
    """
    for name in given:
        if name not in known:
            what = f"{owner} has no option {name!r}"
            raise InputError(unknown(what, name, sorted(known)) if known else f"{what} (it takes none).")
    return {name: known[name].parse(value) for name, value in given.items()}


def unknown(what: str, word: str, known: Iterable[str]) -> str:
    """Return an error about an unknown name, with the known names and the one that may have been meant."""
    names = list(known)
    near = meant(word, names)
    return f"{what}{f'; did you mean {near!r}?' if near else '.'} Choose one of: {', '.join(names)}."


_ABBREVIATED = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "gpu": "cuda"}


def meant(word: str, known: Iterable[str]) -> str | None:
    """Return the known name that a word may have been meant for; None if there is none like it."""
    names = {name.lower(): name for name in known}
    word = word[:LONGEST].lower()
    near = difflib.get_close_matches(_ABBREVIATED.get(word, word), names, n=1)
    return names[near[0]] if near else None


def _unwrapped(annotation: Any) -> tuple[Any, tuple[Any, ...], bool]:  # noqa: ANN401 - any annotation
    """The type, the notes of ``Annotated``, and whether None is allowed."""
    if typing.get_origin(annotation) is Annotated:
        inner, *own = typing.get_args(annotation)
        kind, notes, optional = _unwrapped(inner)
        return kind, (*own, *notes), optional
    members = typing.get_args(annotation)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType) and type(None) in members:
        (inner,) = (member for member in members if member is not type(None))
        kind, notes, _ = _unwrapped(inner)
        return kind, notes, True
    return annotation, (), False


def _container(kind: Any) -> Any:  # noqa: ANN401 - any annotation
    return typing.get_origin(kind) or kind


def _default_of(field: dataclasses.Field[Any]) -> Any:  # noqa: ANN401 - options have many types
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def shown(value: object) -> str:
    """Return a given value as text for an error, shortened. It never raises."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, tables within tables within tables
        return "a value that is too large to show"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def _one_of(value: object, words: Iterable[object]) -> str:
    if str(value) not in map(str, words):
        raise ValueError
    return str(value)
