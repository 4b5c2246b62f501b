"""How the options declared by dataclasses become those of a command, and what is read from them.

A parameter of a command whose type is such a dataclass stands for an option for each of its fields. None of this
imports torch, so that help is there at once.
"""

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.models import OptionInfo

from sparlow.errors import InputError
from sparlow.recipe.recipe import Recipe
from sparlow.schema import (
    Doc,
    FileOnly,
    Option,
    Panel,
    Unset,
    at_least,
    check_fields,
    options_of,
    require_effect,
    values_of,
)

EVALUATION, MACHINE, OUTPUT = Panel("Evaluation"), Panel("Machine"), Panel("Output")
PANELS = (  # as help shows them, after the arguments and what belongs to none
    *("What to keep", "Calibration", "Solver", "Matching", "Text", "Training"),
    *("Measured", "Evaluation", "Tasks", "Machine", "Output"),
)
LONGEST_METAVAR = 20  # characters
METAVARS = {int: "INTEGER", float: "NUMBER", str: "TEXT", Path: "DIRECTORY"}


@dataclass(frozen=True)
class WriteOptions:
    """Whether to overwrite a result, and when a run may start."""

    overwrite: Annotated[bool, Doc("Replace a finished result in --out."), OUTPUT] = False
    force: Annotated[
        bool, Doc("Start even if the estimated memory or disk use exceeds what is available."), MACHINE
    ] = False
    with_loader: Annotated[
        bool,
        Doc(
            "Also write modeling_sparlow.py, so that trust_remote_code=True imports sparlow, or names it where it is "
            "missing."
        ),
        OUTPUT,
    ] = False


@dataclass(frozen=True)
class EvaluateOptions:
    """What ``sparlow evaluate`` measures."""

    evaluate: Annotated[
        tuple[str, ...],
        Doc(
            "Corpora or files to measure perplexity on. FILE#601-800 stands for records 601 to 800 of a table. An "
            'empty "" stands for none.'
        ),
        EVALUATION,
    ] = ("builtin",)
    seqlen: Annotated[int, Doc("Tokens in each window of these texts."), at_least(2), EVALUATION] = 2048
    limit: Annotated[
        int | None,
        Doc("Maximum number of windows of each text and of questions of each task."),
        Unset("all"),
        at_least(1),
        EVALUATION,
    ] = None
    column: Annotated[
        str, Doc("Column that holds the text, where a file or a hub data set is a table."), EVALUATION
    ] = "text"
    baseline: Annotated[
        str | None,
        Doc("A second model to measure, such as the dense one; the first one's predictions are compared with it."),
        EVALUATION,
    ] = None
    tasks: Annotated[
        tuple[str, ...],
        Doc("Tasks to measure: paper (its eight zero-shot tasks), mmlu, or any name of lm-eval or --task-path."),
        Panel("Tasks"),
    ] = ()
    task_path: Annotated[
        Path | None,
        Doc("Directory of task files (.yaml). They take precedence over lm-eval's tasks of the same name."),
        Panel("Tasks"),
    ] = None
    fewshot: Annotated[
        int | None,
        Doc("Examples shown before each question."),
        Unset("as the task says, 5 for mmlu"),
        at_least(0),
        Panel("Tasks"),
    ] = None
    batch_size: Annotated[int, Doc("Sequences in each pass through the model."), at_least(1), Panel("Tasks")] = 8

    def __post_init__(self) -> None:
        """Check every field."""
        check_fields(self, "the options of evaluate")
        if not (self.evaluate or self.tasks):
            raise InputError("There is nothing to measure. Give --evaluate or --tasks.")
        for name, beside in {"seqlen": "evaluate", "batch_size": "tasks", "fewshot": "tasks"}.items():
            if getattr(self, name) != getattr(EvaluateOptions, name) and not getattr(self, beside):
                option = f"--{name.replace('_', '-')}"
                raise InputError(f"{option} has no effect without --{beside}. Add it, or leave {option} out.")


@dataclass(frozen=True)
class Given:
    """What was typed: a recipe file, and the options beside it, which take precedence.

    Attributes:
        base: The file's recipe, or the default one.
        changes: Fields of it that were typed.
        pairs: Options of the algorithm, each as key=value.
    """

    base: Recipe
    changes: Mapping[str, Any]
    pairs: Sequence[str] = ()

    def recipe(self) -> Recipe:
        """The recipe as a whole; another algorithm than the file's does not take over the file's options of it."""
        algorithm = self.changes.get("algorithm", self.base.algorithm)
        changes = dict(self.changes)
        if self.pairs or algorithm != self.base.algorithm:
            kept = self.base.options if algorithm == self.base.algorithm else {}
            changes["options"] = {**kept, **parse_pairs(self.pairs)}
        found = self.base.changed(**changes)
        require_effect(changes, values_of(found), Recipe)  # also for what was typed and is the default
        return found


@dataclass(frozen=True, slots=True)
class Without:
    """Beside the type of a command's parameter: fields that the command does not take, and that keep their defaults."""

    names: tuple[str, ...]


def parameter(option: Option, *, negatable: bool = False) -> inspect.Parameter:
    """What typer reads an option of a command from.

    Args:
        option: Its declaration.
        negatable: A switch can also be turned off, for what a file has turned on.
    """
    if option.note(OptionInfo):  # declared as typer reads it, as what follows no rule is
        return _hand_made(option.name, option.annotation, option.default)
    name = f"--{option.name.replace('_', '-')}"
    kind: Any = list[str] if option.repeatable else option.kind
    doc, panel, unset = option.note(Doc), option.note(Panel), option.note(Unset)
    words = "|".join(map(str, option.words))
    fits = len(words) <= LONGEST_METAVAR  # a longer one would be broken on eighty columns
    metavar = (words if fits else "") or ("NAMES" if option.repeatable else METAVARS.get(option.kind))
    more = (
        " Repeat it, or separate by commas."
        if option.repeatable
        else ""
        if fits
        else f" One of: {words.replace('|', ', ')}."
    )
    declaration = typer.Option(
        f"{name}/--no-{name[2:]}" if kind is bool and negatable else name,
        help=escape(doc.text + more) if doc else None,
        rich_help_panel=panel.title if panel else None,
        metavar=metavar,
        show_default=escape(unset.text) if option.default is None and unset else bool(option.default is not None),
    )
    return inspect.Parameter(
        option.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=list(option.default) if option.repeatable else option.default,
        annotation=Annotated[kind | None if option.optional else kind, declaration],
    )


def recipe_parameters() -> list[inspect.Parameter]:
    """The options that make a recipe: its file, its fields, the options of its algorithm, and --owl."""
    fields = [option for option in options_of(Recipe).values() if not option.note(FileOnly)]
    file = (
        "TOML file with a recipe, or the name of one that `sparlow recipes` lists. Options given here take precedence."
    )
    pair = "An option of the algorithm, as key=value. Repeat it for several."
    plugin = "Python file with algorithms of your own, under @sparlow.pruner or @sparlow.decomposer. Repeatable."
    return [
        _hand_made("recipe", Annotated[str | None, typer.Option(metavar="FILE|NAME", help=file)]),
        *(parameter(option, negatable=True) for option in fields),
        _hand_made(
            "option",
            Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help=pair, rich_help_panel="Solver")],
        ),
        _hand_made(
            "plugin",
            Annotated[list[Path] | None, typer.Option(metavar="FILE.py", help=plugin, rich_help_panel="Solver")],
        ),
        _hand_made(
            "owl",
            Annotated[
                bool | None,
                typer.Option(
                    "--owl/--no-owl", help="Short for --allocate owl, or uniform.", rich_help_panel="What to keep"
                ),
            ],
        ),
    ]


def _hand_made(name: str, annotation: Any, default: object = None) -> inspect.Parameter:  # noqa: ANN401 - a type
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def expanded(
    command: Callable[..., None], prepare: Callable[[Mapping[str, Any]], None] = lambda _: None
) -> Callable[..., None]:
    """Put an option for each field in place of a command's parameters that are ``Given`` or another class of options.

    An option that the command has itself, under the same name, is not added. Help shows the panels in their order.

    Args:
        command: The function.
        prepare: Called with the value of every option before objects are made of them, for which torch is imported.
    """
    declared = inspect.signature(command).parameters
    own = {name: p for name, p in declared.items() if _class_of(p) is None}
    groups = {name: (of, _members(p, of, own)) for name, p in declared.items() if (of := _class_of(p))}

    @functools.wraps(command)
    def wrapper(*, context: typer.Context, **values: Any) -> None:  # noqa: ANN401 - options have many types
        prepare(values)
        typed = {name for name in values if _source(context, name) in ("COMMANDLINE", "ENVIRONMENT")}
        built = {}
        for name, (of, members) in sorted(groups.items(), key=lambda group: group[1][0] is Given):  # torch comes last
            mine = {p.name: values.pop(p.name) for p in members}
            built[name] = _given(mine, typed) if of is Given else _built(of, mine)
        command(**values, **built)

    parameters = [*own.values(), *(p for _, members in groups.values() for p in members)]
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in sorted(parameters, key=_place)]
    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    wrapper.__signature__ = inspect.Signature([context, *parameters])  # type: ignore[attr-defined]  # what typer reads
    wrapper.__annotations__ = {p.name: p.annotation for p in [context, *parameters]}
    return wrapper


def _members(declared: inspect.Parameter, of: type, own: Iterable[str]) -> list[inspect.Parameter]:
    """The options that a command's parameter stands for."""
    excluded = {
        *own,
        *(name for note in _notes(declared.annotation) if isinstance(note, Without) for name in note.names),
    }
    every = recipe_parameters() if of is Given else [parameter(option) for option in options_of(of).values()]
    return [p for p in every if p.name not in excluded]


def _class_of(parameter: inspect.Parameter) -> type | None:
    annotation = parameter.annotation
    kind = typing.get_args(annotation)[0] if typing.get_origin(annotation) is Annotated else annotation
    return kind if isinstance(kind, type) and dataclasses.is_dataclass(kind) else None


def _notes(annotation: Any) -> tuple[Any, ...]:  # noqa: ANN401 - any annotation
    return typing.get_args(annotation)[1:] if typing.get_origin(annotation) is Annotated else ()


def _place(parameter: inspect.Parameter) -> int:
    panels = (getattr(note, "rich_help_panel", None) for note in _notes(parameter.annotation))
    return next((1 + PANELS.index(panel) for panel in panels if panel), 0)


def _source(context: typer.Context, name: str) -> str:
    source = context.get_parameter_source(name)
    return source.name if source else ""


def _built(of: type, values: Mapping[str, Any]) -> Any:  # noqa: ANN401 - an object of the class
    declared = options_of(of).items()
    lists = {name for name, option in declared if option.repeatable and not option.note(OptionInfo)}
    return of(
        **{name: tuple(dict.fromkeys(split(value))) if name in lists else value for name, value in values.items()}
    )


def _given(values: dict[str, Any], typed: set[str]) -> Given:
    file, pairs, owl, plugins = (values.pop(name, None) for name in ("recipe", "option", "owl", "plugin"))
    if plugins:
        load_plugins(plugins)
    changes = {name: value for name, value in values.items() if name in typed}
    if "ignore" in changes:
        changes["ignore"] = tuple(dict.fromkeys(split(changes["ignore"])))
    if owl is not None:
        meant = "owl" if owl else "uniform"
        if changes.setdefault("allocate", meant) != meant:
            switch = f"--{'owl' if owl else 'no-owl'}"
            raise InputError(f"{switch} and --allocate {changes['allocate']} contradict each other. Give one.")
    return Given(Recipe.from_file(file) if file else Recipe(), changes, pairs or ())


def load_plugins(files: Iterable[Path]) -> None:
    """Register the algorithms of files."""
    from sparlow.algorithms import load_plugin

    for file in files:
        load_plugin(file)


def split(names: str | Iterable[str]) -> list[str]:
    """Read a list: each text given may hold several names, separated by commas; an empty one forgets those before."""
    found: list[str] = []
    for text in [names] if isinstance(names, str) else names:
        found = [*found, *(name.strip() for name in text.split(",") if name.strip())] if text.strip() else []
    return found


def parse_named_pairs(pairs: Sequence[str]) -> dict[str, dict[str, str]]:
    """Read ALGORITHM.key=value, each; return the options by the algorithm's name."""
    found: dict[str, dict[str, str]] = {}
    for pair, value in parse_pairs(pairs).items():
        name, dot, key = pair.rpartition(".")
        if not dot:
            raise InputError(f"--option {pair}={value} is not understood. Write ALGORITHM.key=value.")
        found.setdefault(name, {})[key] = value
    return found


def parse_pairs(pairs: Sequence[str]) -> dict[str, str]:
    """Read key=value, each."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise InputError(f"--option {pair} is not understood. Write key=value.")
        found[name] = value
    return found
