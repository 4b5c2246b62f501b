"""The recipes that come with sparlow."""

import json
from importlib.resources import files
from pathlib import Path

import pytest

from command_line import run
from sparlow.errors import InputError
from sparlow.recipe.named import packaged
from sparlow.recipe.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
NAMES = [one.name for one in packaged()]


@pytest.mark.parametrize("name", NAMES)
def test_a_packaged_recipe_is_one(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = Recipe.from_file(name)
    assert found == Recipe.from_toml(found.to_toml())
    (tmp_path / name).write_text('pattern = "1:4"\n')  # a file of the name goes first
    assert Recipe.from_file(name).pattern == "1:4"


def test_every_file_is_listed():
    there = {Path(file.name).stem for file in (files("sparlow.recipe") / "library").iterdir()}
    assert there == {*NAMES, "about"}


def test_the_configurations_of_the_paper_are_there():
    kept = {(recipe.pattern, recipe.rank, recipe.allocate) for recipe in map(Recipe.from_file, NAMES)}
    for pattern in ("2:4", "3:8", "4:8", "2:8"):
        assert (pattern, 64, "uniform") in kept
    assert {("0.5", 128, "uniform"), ("0.7", 64, "owl")} <= kept


@pytest.mark.parametrize("one", [one for one in packaged() if one.measured], ids=lambda one: one.name)
def test_a_figure_stands_in_the_source_that_is_named(one):
    path = ROOT / one.measured.source
    if path.suffix == ".md":
        (line,) = (row for row in path.read_text().splitlines() if f"| {one.measured.perplexity:.2f} ±" in row)
        recipe = Recipe.from_file(one.name)
        assert all(f"--{name} {getattr(recipe, name)}" in line for name in ("pattern", "values", "rank"))
        assert line.startswith(f"| {one.measured.bits:.2f} |")
        return
    rows = json.loads(path.read_text())["rows"]
    (row,) = (row for row in rows if row["name"] == Recipe.from_file(one.name).algorithm)
    assert one.measured.perplexity in [round(value, 2) for value in row["perplexity"].values()]
    assert round(row["bits_per_weight"], 2) == one.measured.bits


def test_a_slip_in_a_name_is_told(tmp_path):
    with pytest.raises(InputError, match="no packaged recipe '3basil-16to32-r6'; did you mean '3basil-16to32-r64'"):
        Recipe.from_file("3basil-16to32-r6")
    (tmp_path / "recipe.yaml").write_text("pattern: 2:4\n")
    with pytest.raises(InputError, match="is not TOML"):
        Recipe.from_file(tmp_path / "recipe.yaml")


def test_the_list_on_a_terminal_and_for_programs(capsys):
    assert run("recipes") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in NAMES)
    assert shown.count("not measured") == sum(one.measured is None for one in packaged())
    assert run("recipes", "--json") == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == NAMES
