"""Every command of the README is read to the point where only the model is missing."""

import re
import shlex
from pathlib import Path

import pytest

from command_line import run_and_fail

README = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
MODEL_MISSING = r"Cannot open the model \S+|There is no directory \S+|\S+ has no sparlow.json"


def commands(text):
    """The arguments of each ``sparlow`` command in the code blocks: joined lines, variables and comments left out."""
    fenced = re.findall(r"^[ ]*```(\w*)[ ]*\n(.*?)^[ ]*```[ ]*$", text, re.MULTILINE | re.DOTALL)
    blocks = [block for language, block in fenced if not language]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = (re.fullmatch(r"[ ]*(?:[A-Z_]+=\S+ )*sparlow (.*)", line) for line in lines)
    return [shlex.split(match[1], comments=True) for match in found if match]


COMMANDS = commands(README)


def test_all_commands_are_found():
    assert len(COMMANDS) == len(re.findall(r"^(?:[A-Z_]+=\S+ )*sparlow ", README, re.MULTILINE)) >= 5
    assert {words[0] for words in COMMANDS} >= {"compress", "compare", "evaluate", "inspect"}


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words)[:40])
def test_a_command_of_the_readme_lacks_nothing_but_its_model(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert re.search(MODEL_MISSING, run_and_fail(capsys, *words))
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("slip", ["3basik", "alpss"])
def test_a_slip_in_a_name_would_be_noticed(slip, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (words,) = [words for words in COMMANDS if words[0] == "compare" and ",alps," in " ".join(words)]
    spoilt = [re.sub(r"3basil$|(?<=,)alps(?=,)", slip, word) for word in words]
    assert spoilt != words
    assert not re.search(MODEL_MISSING, run_and_fail(capsys, *spoilt))
