"""Help, the version and errors of usage: quick, whole, and in one style."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM

import sparlow
from command_line import run, run_and_fail
from families import save_tiny, tiny_tokenizer
from sparlow.cli import commands

GROUP = typer.main.get_command(commands.app)
HEAVY = ("torch", "transformers", "datasets", "numpy", "pydantic")


def squeezed(text):
    """Without spaces and frames, so that it does not matter where lines end."""
    return re.sub(r"[\s│]", "", text)


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("name", GROUP.commands)
def test_help_is_whole_on_eighty_columns(name, flag, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert run(name, flag) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    shown = squeezed(" ".join(lines))
    assert "…" not in shown
    for option in GROUP.commands[name].params:
        assert squeezed(option.help.replace("\\[", "[")) in shown, option.name
        assert all(word in shown for word in (*option.opts, *option.secondary_opts) if word.startswith("--")), (
            option.name
        )
        if isinstance(option.show_default, str):
            assert f"[default:({squeezed(option.show_default)})]" in shown, option.name
        elif isinstance(option.default, str | float) and not isinstance(option.default, bool):
            assert f"[default:{option.default}]" in shown, option.name


def test_help_of_all_lists_commands_and_what_stands_before_them(capsys):
    assert run("--help") == 0
    shown = capsys.readouterr().out
    for word in (*GROUP.commands, "--version", "--debug", "-h"):
        assert word in shown
    assert run() == 2
    assert "Usage" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["comp"], {"compress", "compare"}),
        (["compress", "--evalu"], {"--evaluate", "--evaluate-seqlen"}),
        (["finetune", "DIR", "--data"], {"--dataset"}),
    ],
)
def test_a_shell_completes_commands_and_options(typed, meant, tmp_path):
    """As after `sparlow --install-completion`, which puts this function into the shell's own files."""
    program = tmp_path / "sparlow"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m sparlow "$@"\n')
    program.chmod(0o755)
    words = " ".join(["sparlow", *typed])
    script = f"""eval "$(sparlow --show-completion bash)"
        COMP_WORDS=({words}) COMP_CWORD={len(typed)}
        _sparlow_completion sparlow && printf '%s\\n' "${{COMPREPLY[@]}}" """
    search = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    shown = subprocess.run(
        ["bash", "-c", script],  # noqa: S607 - whichever comes first
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PATH": search},
    )
    assert set(shown.stdout.split()) == meant, shown.stderr


def test_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"sparlow {version('sparlow')}\n" == f"sparlow {sparlow.__version__}\n"


def test_help_and_version_import_nothing_heavy():
    """CPU depends on the machine; what is imported decides it."""
    calls = [["--help"], ["--version"], *([name, "--help"] for name in GROUP.commands)]
    program = f"""
import sys
from sparlow.cli.commands import main
for arguments in {calls!r}:
    try:
        main(arguments)
    except SystemExit as stop:
        assert not stop.code, arguments
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    shown = subprocess.check_output([sys.executable, "-c", program], env=environment, text=True, timeout=120)
    assert shown.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compress", "model", "--out", "x", "--patern", "2:4"], "--pattern"),
        (["compress", "model", "--out", "x", "--samples", "many"], "'--samples'"),
        (["compress", "model", "--out", "x", "--samples"], "The option --samples has no value. Write one behind it."),
        (["squeeze"], "squeeze"),
        (["compress", "model", "--out", "x", "--perplexity", "c4"], "--perplexity is called --evaluate in sparlow com"),
        (
            ["compress", "model", "--out", "x", "--dataset", "c4"],
            "--dataset is called --calibration in sparlow compress",
        ),
        (["evaluate", "model", "--perplexity", "c4"], "--perplexity is called --evaluate in sparlow evaluate."),
        (["finetune", "model", "--out", "x", "--seqlen", "8"], "--seqlen is called --block-size in sparlow finetune."),
        (["algorithms", "--dataset", "c4"], "There is no option --dataset"),
        (["algorithms", "wanda"], "More arguments than it takes: wanda. Leave them out."),
        (["compress", "model"], "The option --out is missing. Add it."),
        (["verify", "out"], "There is no command 'verify'. Write sparlow inspect DIRECTORY --verify."),
        (["comprss", "model"], "There is no command 'comprss'; did you mean 'compress'? Choose one of: compress, plan"),
        (["generate", "out", "--prompt", "a", "--max-new-tokens", "9"], "is called --max-tokens in sparlow generate."),
        (["finetune", "out", "--out", "a", "--data", "c4"], "--data is called --dataset in sparlow finetune."),
    ],
)
def test_errors_of_usage_look_like_all_others(arguments, said, capsys):
    assert run(*arguments) == 2
    first, usage, advice = capsys.readouterr().err.splitlines()
    assert first.startswith("error: ")
    assert said in first
    command = f"sparlow {arguments[0]}" if arguments[0] in GROUP.commands else "sparlow"
    assert usage.startswith(f"Usage: {command} ")
    assert advice == f"`{command} --help` lists the options."


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--evaluate", "a", "--evaluate", "b,c"], ("a", "b", "c")),
        (["--evaluate", "a, b", "--evaluate", "a"], ("a", "b")),
        (["--evaluate", ""], ()),
        (["--evaluate", "a", "--evaluate", "", "--evaluate", "b"], ("b",)),
        ([], ("builtin",)),
    ],
)
def test_lists_are_repeated_or_separated_by_commas(given, expected, monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    seen = []

    def noted(_, recipe, **options):
        seen.append((recipe.ignore, options["evaluate"]))
        raise KeyboardInterrupt

    monkeypatch.setattr("sparlow.run.compress.compress", noted)
    assert run("compress", tmp_path, "--out", tmp_path / "out", "--ignore", "k_proj", "--ignore", "a,b", *given) == 130
    assert seen == [(("k_proj", "a", "b"), expected)]


# Numbers that are none


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("place")
    save_tiny("gpt_neox", place / "model")
    (place / "text.txt").write_text("".join(chr(32 + (7 * i * i + i // 3) % 95) for i in range(600)))
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(float("nan"))
    model.save_pretrained(place / "damaged")
    tiny_tokenizer().save_pretrained(place / "damaged")
    return place


def strictly(text):
    """Parse JSON as every strict reader does."""

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("baseline", [False, True])
def test_a_perplexity_that_is_no_number_is_a_failure_with_its_model_and_corpus(baseline, place, capsys, tmp_path):
    text, file = place / "text.txt", tmp_path / "found.json"
    models = [place / "model", "--baseline", place / "damaged"] if baseline else [place / "damaged"]
    line = run_and_fail(capsys, "evaluate", *models, "--evaluate", text, "--seqlen", 16, "--json", file, code=1)
    assert f"The perplexity of {place / 'damaged'} on {text} is nan" in line
    found = strictly(file.read_text())
    assert (found["baseline"] if baseline else found)["perplexity"] == {str(text): "nan"}


def test_a_place_that_is_not_there_is_told_before_the_work(place, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("sparlow.cli.evaluating.open_model", lambda *_, **__: pytest.fail("the model was opened"))
    for command in (["evaluate", place / "model"], ["plan", place / "model"]):
        assert "no directory" in run_and_fail(capsys, *command, "--json", tmp_path / "none" / "found.json")


def test_inspect_prints_strict_json(place, capsys, tmp_path):
    shutil.copytree(place / "model", tmp_path / "model")
    recipe = sparlow.Recipe(algorithm="magnitude", samples=4, seqlen=16)
    text = str(place / "text.txt")
    sparlow.compress(tmp_path / "model", recipe, calibration=text, out=tmp_path / "out", evaluate=())
    assert run("inspect", tmp_path / "out", "--json") == 0
    assert strictly(capsys.readouterr().out)["problems"] is None
