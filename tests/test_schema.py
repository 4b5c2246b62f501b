"""Options declared once: what is given is checked against the declaration, and every place that shows it follows."""

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from typer.testing import CliRunner

import sparlow
from sparlow.algorithms import decompose
from sparlow.cli import commands, options, reference
from sparlow.cli.options import EvaluateOptions, Given, WriteOptions, expanded
from sparlow.errors import InputError
from sparlow.finetuning.options import FinetuneOptions
from sparlow.recipe import training_plan
from sparlow.recipe.recipe import MATCH_PRESETS, Recipe
from sparlow.recipe.run_options import RunOptions
from sparlow.schema import (
    ABOVE_0,
    FRACTION,
    Choices,
    Doc,
    FileOnly,
    Option,
    Panel,
    Unset,
    at_least,
    check_fields,
    documented,
    options_of,
)

ROOT = Path(__file__).parents[1]
RECORDS = (Recipe, RunOptions, WriteOptions, FinetuneOptions, EvaluateOptions)
WORDS = Annotated[str, Choices("colour", ("red", "green"))]


# One option


@pytest.mark.parametrize(
    ("annotation", "given", "expected"),
    [
        (int, 7, 7),
        (float, 7, 7.0),
        (float, 0.5, 0.5),
        (bool, True, True),
        (str, "word", "word"),
        (str | None, None, None),
        (Annotated[int | None, at_least(2)], 2, 2),
        (Annotated[int, at_least(2)] | None, None, None),
        (Annotated[float, FRACTION], 0, 0.0),
        (WORDS, "green", "green"),
        (Path, "a/b", "a/b"),
        (Sequence[str], ["a", "b"], ("a", "b")),
        (tuple[str, ...], (), ()),
        (Mapping[str, Any], {"a": 1}, {"a": 1}),
    ],
)
def test_check_takes_what_is_declared(annotation, given, expected):
    checked = Option("name", None, annotation).check(given, "a thing")
    assert checked == expected
    assert type(checked) is type(expected)


@pytest.mark.parametrize(
    ("annotation", "given", "said"),
    [
        (int, 7.0, "Field name of a thing must be a whole number, not 7.0."),
        (int, True, "must be a whole number, not True."),
        (float, "7", "must be a number, not '7'."),
        (float, float("nan"), "name must be a number and finite, not nan."),
        pytest.param(float, 10**400, "name must be a number and finite, not 1000", id="long"),
        (int, 10**30, "name must be a number and of at most 18 digits, not 1000"),
        pytest.param(int, 1 << 20_000, "at most 18 digits, not a value that is too large to show.", id="very long"),
        (bool, 1, "must be true or false, not 1."),
        (str, None, "must be text, not None."),
        (Annotated[int, at_least(2)], 1, "name must be at least 2, not 1."),
        (Annotated[float, ABOVE_0], float("inf"), "name must be above 0 and finite, not inf."),
        (WORDS, "rod", "There is no colour 'rod'; did you mean 'red'? Choose one of: red, green."),
        (WORDS, "blue?", "There is no colour 'blue?'. Choose one of: red, green."),
        (Sequence[str], "text", "must be a list, not 'text'."),
        (Sequence[str], ["a", 1], "must be a list, not ['a', 1]."),
        (Mapping[str, Any], [1], "must be a table, not [1]."),
        (str, ["x" * 1000], "must be text, not ['xxx"),
    ],
)
def test_check_refuses_the_rest_in_a_sentence(annotation, given, said):
    with pytest.raises(InputError) as caught:
        Option("name", None, annotation).check(given, "a thing")
    assert said in str(caught.value)
    assert len(str(caught.value)) < 300


def test_literals_are_choices():
    assert Option("name", "a", Literal["a", "b"]).words == ("a", "b")


# All of them


@pytest.mark.parametrize("record", RECORDS)
def test_every_option_is_explained_in_whole_sentences_and_has_its_place(record):
    for name, option in options_of(record).items():
        text = option.note(Doc).text
        assert text[0].isupper(), name
        assert text.endswith("."), name
        assert option.note(Panel).title in options.PANELS, name


@pytest.mark.parametrize("record", RECORDS)
def test_every_default_passes_its_own_check(record):
    made = record()
    assert {f.name: getattr(made, f.name) for f in fields(record)} == {
        n: o.default for n, o in options_of(record).items()
    }


@pytest.mark.parametrize(
    ("function", "record", "names"),
    [
        (sparlow.compress, RunOptions, {}),
        (sparlow.plan, RunOptions, {}),
        (sparlow.compress, WriteOptions, {}),
        (sparlow.finetune, FinetuneOptions, {}),
        (sparlow.evaluate, EvaluateOptions, {"baseline": None}),
    ],
)
def test_the_keywords_of_the_api_are_the_options_with_their_defaults(function, record, names):
    parameters = inspect.signature(function).parameters
    for name, option in options_of(record).items():
        keyword = names.get(name, name)
        if keyword is not None:
            assert parameters[keyword].default == option.default, name
            assert type(parameters[keyword].default) is type(option.default), name


def test_one_matrix_is_damped_as_a_recipe_says():
    parameters = inspect.signature(decompose).parameters
    for name in ("algorithm", "damping", "relative_damping"):
        assert parameters[name].default == getattr(Recipe(), name)


def test_fine_tuning_and_runs_share_their_other_keywords():
    parameters = inspect.signature(sparlow.finetune).parameters
    for name in ("evaluate", "limit", "device", "trust_remote_code"):
        assert parameters[name].default == getattr(RunOptions(), name)


def test_the_presets_of_matching_are_those_that_a_recipe_may_name():
    assert set(training_plan.PRESETS) == set(MATCH_PRESETS)


COMMANDS = typer.main.get_command(commands.app).commands
TAKEN = {  # the dataclasses whose options a command has
    "compress": (Recipe, RunOptions, WriteOptions),
    "plan": (Recipe, RunOptions),
    "compare": (Recipe, RunOptions, WriteOptions),
    "finetune": (FinetuneOptions,),
    "evaluate": (EvaluateOptions,),
}
OWN = {"compare": {"algorithm", "match", "with_loader"}}  # what a command has in a form of its own


@pytest.mark.parametrize("name", TAKEN)
def test_the_command_line_has_every_option_with_its_default(name):
    shown = {parameter.name: parameter for parameter in COMMANDS[name].params}
    for record in TAKEN[name]:
        for option in options_of(record).values():
            if option.note(FileOnly) or option.name in OWN.get(name, ()):
                continue
            found = shown[option.name]
            expected = list(option.default) if option.repeatable else option.default
            assert found.default == expected, option.name
            assert f"--{option.name.replace('_', '-')}" in found.opts
            assert option.note(Doc).text.replace("[", "\\[") in found.help


def test_the_page_of_options_is_up_to_date():
    assert (ROOT / "docs" / "options.md").read_text("utf-8") == reference.page(), "run `make docs-options`"


# A new one, in one line


@documented
@dataclass(frozen=True)
class Longer(Recipe):
    """A recipe with one more line."""

    polish: Annotated[int | None, Doc("Rounds of polishing."), at_least(2), Unset("none"), Panel("Solver")] = None


def test_a_new_field_is_checked_where_a_recipe_is_read():
    assert Longer.from_toml("polish = 3").polish == 3
    assert Longer.from_toml(Longer(polish=4).to_toml()) == Longer(polish=4)
    with pytest.raises(InputError, match=r"no field 'polsh'; did you mean 'polish'\?"):
        Longer.from_toml("polsh = 3")
    with pytest.raises(InputError, match="Field polish of a recipe must be a whole number, not '3'"):
        Longer.from_toml("polish = '3'")
    for wrong in (lambda: Longer(polish=1), lambda: Longer.from_toml("polish = 1"), lambda: Longer().changed(polish=1)):
        with pytest.raises(InputError, match="polish must be at least 2, not 1"):
            wrong()
    assert "polish: Rounds of polishing." in Longer.__doc__
    assert "samples: Number of calibration windows." in Longer.__doc__


def test_a_new_field_is_on_the_command_line_and_in_the_docs(monkeypatch):
    monkeypatch.setattr(options, "Recipe", Longer)
    monkeypatch.setattr(reference, "SECTIONS", (("Recipe", "", Longer),))
    seen = []
    app = typer.Typer()

    @app.command()
    @expanded
    def show(given: Given) -> None:
        seen.append(given.recipe())

    assert "--polish" in CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80"}).output
    assert CliRunner().invoke(app, ["--polish", "5"]).exit_code == 0
    assert CliRunner().invoke(app, []).exit_code == 0
    assert [recipe.polish for recipe in seen] == [5, None]
    assert "| Solver | `polish` | whole number, at least 2 | none | Rounds of polishing. |" in reference.page()


def test_a_check_of_fields_puts_what_it_made_in_place():
    @dataclass(frozen=True)
    class Thing:
        rate: float = 1.0
        names: Sequence[str] = dataclasses.field(default_factory=list)

        def __post_init__(self):
            check_fields(self, "a thing")

    made = Thing(2, ["a"])
    assert (type(made.rate), made.names) == (float, ("a",))
