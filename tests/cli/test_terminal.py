"""What every command has in common: how much it says, JSON, examples, Ctrl-C; and what pipelines require."""

import contextlib
import io
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import typer

from command_line import run, run_and_fail
from families import save_tiny
from sparlow.algorithms import _registry
from sparlow.cli import ahead, commands, display, planning, requirements
from sparlow.cli.examples import EXAMPLES
from sparlow.cli.requirements import parse_requirement, require_all
from sparlow.errors import InputError, RunError
from sparlow.planning.choices import Choice
from sparlow.report.records import Report

COMMANDS = typer.main.get_command(commands.app).commands
TEXT = "".join(chr(32 + (7 * i * i + i // 3) % 95) for i in range(600))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("place")
    save_tiny("gpt_neox", place / "model")
    (place / "text.txt").write_text(TEXT)
    assert run(*compress(place, place / "out")) == 0
    return place


def compress(place, out):
    text = place / "text.txt"
    words = ["compress", place / "model", "--out", out, "--algorithm", "magnitude", "--pattern", "2:4"]
    return [*words, "--calibration", text, "--samples", 4, "--seqlen", 16, "--evaluate", text]


# How much is said


def test_the_first_line_says_what_a_run_takes(place, capsys, tmp_path):
    assert run(*compress(place, tmp_path / "out")) == 0
    first = capsys.readouterr().out.splitlines()[0]
    size = r"[\d.]+ [KMG]B"
    assert re.fullmatch(
        rf"this will take at most {size} of main memory \({size} are free\), {size} → {size} on disk", first
    )


def test_quiet_leaves_nothing_but_errors_and_json(place, capsys, tmp_path):
    assert run("--quiet", *compress(place, tmp_path / "a")) == 0
    assert capsys.readouterr() == ("", "")
    assert run(*compress(place, tmp_path / "b"), "-q", "--json") == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["layers"] == json.loads((tmp_path / "b" / "report.json").read_text())["layers"]
    assert shown.err == ""
    assert "'wandaa'" in run_and_fail(capsys, *compress(place, tmp_path / "c"), "-q", "--algorithm", "wandaa")


def test_verbose_has_a_line_a_layer(place, capsys, tmp_path):
    assert run(*compress(place, tmp_path / "out"), "--verbose") == 0
    lines = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("blocks: block ") for line in lines) == 12
    assert "contradict" in run_and_fail(capsys, "recipes", "-q", "-v")


@pytest.mark.parametrize("words", [["recipes"], ["algorithms"], ["env"], ["inspect", "OUT"]], ids=lambda w: w[0])
def test_json_goes_to_a_file_or_stands_alone(words, place, capsys, tmp_path):
    words = [place / "out" if word == "OUT" else word for word in words]
    assert run(*words, "--json", tmp_path / "found.json") == 0
    assert capsys.readouterr().out
    assert run(*words, "--json") == 0
    alone, written = json.loads(capsys.readouterr().out), json.loads((tmp_path / "found.json").read_text())
    assert alone.keys() == written.keys() if words == ["env"] else alone == written  # what memory is free changes
    assert "no directory" in run_and_fail(capsys, *words, "--json", tmp_path / "none" / "found.json")


def test_no_color(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = []
    for name in ("FORCE_COLOR", "NO_COLOR"):
        monkeypatch.setenv(name, "1")
        file = io.StringIO()
        display.SafeConsole(file=file).print("[red]error:[/] no")
        shown.append("\x1b[3" in file.getvalue())
    assert shown == [True, False]


@pytest.mark.slow
def test_no_color_in_a_process_of_its_own():
    environment = {"NO_COLOR": "1", "FORCE_COLOR": "1", "PATH": "", "PYTHONPATH": ":".join(sys.path)}
    shown = subprocess.run(
        [sys.executable, "-m", "sparlow", "recipes"], env=environment, capture_output=True, text=True, check=True
    )
    assert "\x1b[3" not in shown.stdout


# Help


def test_every_command_has_two_examples_that_are_understood(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("")
    assert set(EXAMPLES) == set(COMMANDS)
    for name, examples in EXAMPLES.items():
        assert len(set(examples)) == 2
        assert run(name, "--help") == 0
        shown = capsys.readouterr().out
        for example in examples:
            assert example in shown, name
            words = shlex.split(example)
            assert words[:2] == ["sparlow", name]
            COMMANDS[name].make_context(name, words[2:])  # raises what is no option


def test_a_number_that_is_none_is_told_in_our_words(capsys, tmp_path):
    assert run("compress", "model", "--out", tmp_path / "out", "--rank", "many") == 2
    first, usage, _ = capsys.readouterr().err.splitlines()
    assert "--rank" in first
    assert "Input should" not in first
    assert "whole number" in first or "integer" in first
    assert "{" not in usage


# Names


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device", "gpu"], "There is no device 'gpu'; did you mean 'cuda'?"),
        (["--device", "mps"], "is not there: torch"),
        (["--dtype", "bf16"], "There is no data type 'bf16' of weights; did you mean 'bfloat16'?"),
        (["--offload", "dsk"], "did you mean 'disk'?"),
        (["--pattern", "2;4"], "did you mean '2:4'?"),
        (["--pattern", "50%"], "did you mean '0.5'?"),
        (["--recipe", "3basil-2to4-r6"], "did you mean '3basil-2to4-r64'?"),
        (["--calibration", "wikitext"], "Did you mean 'wikitext2'?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_slip_is_told_with_what_was_meant(words, said, place, capsys, tmp_path):
    line = run_and_fail(capsys, *compress(place, tmp_path / "out"), *words)
    assert said in line
    assert len(line) < 500


def test_a_directory_that_is_not_there_is_called_so(place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    for words in (["evaluate", "modle"], ["generate", "modle", "--prompt", "a"], ["plan", "modle"]):
        assert "There is no such directory; did you mean model?" in run_and_fail(capsys, *words)
    assert "There is no directory outt; did you mean out?" in run_and_fail(capsys, "inspect", "outt")


def test_an_unfinished_run_is_called_so(capsys, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "sparlow.json").write_text('{"finished": false}')
    for words in (["evaluate", tmp_path / "run"], ["inspect", tmp_path / "run"]):
        assert "is an unfinished run" in run_and_fail(capsys, *words)


# Ctrl-C


def test_ctrl_c_while_libraries_are_imported_is_quiet(monkeypatch, capsys):
    def interrupted(*_, **__):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise ImportError("initialization failed")  # what is made of it inside of compiled code

    monkeypatch.setattr(ahead, "quieten_libraries", interrupted)
    assert run("recipes") == 130
    assert "Traceback" not in capsys.readouterr().err


# What pipelines require


@pytest.mark.parametrize(
    ("text", "found", "dense", "holds"),
    [
        ("perplexity<=+10%", 11.0, 10.0, True),
        ("perplexity<+10%", 11.0, 10.0, False),
        ("perplexity <= 110%", 11.1, 10.0, False),
        ("perplexity<=12", 12.0, None, True),
        ("perplexity<=+10%", 5.0, None, False),
        ("perplexity<=+10%", float("nan"), 10.0, False),
        ("bits<=4.6", 4.5, None, True),
        ("bytes<=1.5MB", 1_500_001, None, False),
        ("bytes<=35%", 35, 100, True),
        ("relative_error<0.01", 0.009, None, True),
    ],
)
def test_a_bound(text, found, dense, holds):
    assert parse_requirement(text).holds(found, dense) is holds


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("perplexity", "is not understood"),
        ("perplexity>=3", "is not understood"),
        ("perplexty<=3", "did you mean 'perplexity'"),
        ("bits<=10%", "no dense figure"),
        ("bits<=4MB", "Only bytes"),
        ("bytes<=4XB", "Only bytes"),
        ("perplexity<=+3", "adds to nothing"),
    ],
)
def test_a_bound_that_is_none(text, said):
    with pytest.raises(InputError, match=said):
        parse_requirement(text)


def test_all_that_is_missed_is_named():
    asked = [parse_requirement(text) for text in ("perplexity<=+10%", "bits<=4")]
    with pytest.raises(RunError, match=r"perplexity on a is 12 \(dense 10\).*; bits is 4.5, and bits<=4 was required"):
        require_all(asked, {"perplexity": {"a": 12.0, "b": 1.0}, "bits": {"": 4.5}}, {"perplexity": {"a": 10, "b": 1}})
    assert requirements.FIGURES[0] == "perplexity"


def test_a_result_that_misses_is_written_and_ends_with_1(place, capsys, tmp_path):
    command = [*compress(place, tmp_path / "out"), "--json", tmp_path / "found.json"]
    assert "bits is" in run_and_fail(capsys, *command, "--require", "bits<=0.1", code=1)
    assert json.loads((tmp_path / "found.json").read_text())["bits_per_weight"] > 1
    assert run("inspect", tmp_path / "out", "--verify") == 0
    assert run(*compress(place, tmp_path / "b"), "--require", "bits<=32", "--require", "perplexity<=1000%") == 0
    none = [*compress(place, tmp_path / "c"), "--evaluate", ""]
    assert "no text is measured" in run_and_fail(capsys, *none, "--require", "perplexity<=+10%")
    assert not (tmp_path / "c").exists()


def test_an_evaluation_that_misses_ends_with_1(place, capsys):
    command = ["evaluate", place / "out", "--evaluate", place / "text.txt", "--seqlen", 16]
    for words, code, said in (
        (["--require", "perplexity<=1"], 1, "perplexity on"),
        (["--require", "perplexity<=+1%"], 2, "--baseline"),
        (["--require", "bits<=4"], 2, "for compress"),
    ):
        assert said in run_and_fail(capsys, *command, *words, code=code)
    assert run(*command, "--baseline", place / "model", "--require", "perplexity<=500%") == 0


# What is said of a result


def rows(*pairs):
    return [{"loss_before": before, "loss_after": after, "seconds": 2.0} for before, after in pairs]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ""),
        ({"matching": rows((2, 1), (4, 2))}, "matching: mean loss of 2 blocks 3 → 1.5 (50% less); 4 s"),
        ({"distillation": rows((0.5, 0.4))[0]}, "matching: loss towards the dense logits 0.5 → 0.4 (20% less); 2 s"),
        ({"distillation": rows((0.5, 0.5))[0]}, "did not fall below 0.5, so nothing was changed"),
    ],
)
def test_what_matching_did_is_said(changes, said):
    found = display.matching_said(Report({}, **changes))
    assert said in found
    assert bool(said) == bool(found)


def test_a_file_of_weights_that_was_cut_is_named(place, capsys, tmp_path):
    shutil.copytree(place / "model", tmp_path / "model")
    file = next((tmp_path / "model").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:20])
    assert f"{file} is damaged or cut short" in run_and_fail(capsys, "evaluate", tmp_path / "model")


def test_what_a_fraction_keeps_is_said(place, capsys, tmp_path):
    assert run(*compress(place, tmp_path / "out"), "--pattern", "0.25") == 0
    assert "pattern 0.25 keeps 0.75 of the entries of S" in capsys.readouterr().out.splitlines()[1]


def test_a_form_that_barely_does_not_fit_says_by_how_much(capsys):
    """4.504 bits are shown as 4.50, which is not more than the 4.5 that were asked for."""
    shown = [
        Choice(name, {}, 10**8, bits, bits <= 4.5, None, "", (), max(bits / 4.5 - 1, 0))
        for name, bits in (("a", 4.4), ("b", 4.5001), ("c", 4.504), ("d", 5.5))
    ]
    planning._show_choices(SimpleNamespace(choices=shown, left_out=()))
    said = {line[0]: line for line in capsys.readouterr().out.splitlines() if re.match("[a-d]  +100.0 MB", line)}
    assert "fits" in said["a"]
    assert all("too large by 0.1%" in said[name] for name in "bc")
    assert re.search(r"too large +not measured", said["d"])


def test_an_algorithm_of_ones_own_is_given_as_a_file(place, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(_registry, "_ALGORITHMS", dict(_registry._ALGORITHMS))  # for the other tests
    (tmp_path / "mine.py").write_text(
        "import sparlow\n\n@sparlow.pruner('mine-on-the-command-line')\ndef keep_large(W, gram, pattern):\n"
        "    'Keep what is large.'\n    return W * pattern.mask(W.abs())\n"
    )
    own = ["--plugin", tmp_path / "mine.py"]
    assert run(*compress(place, tmp_path / "out"), "--algorithm", "mine-on-the-command-line", *own) == 0
    assert run("algorithms", *own) == 0
    assert "mine-on-the-command-line (pruner): Keep what is large." in capsys.readouterr().out
    line = run_and_fail(capsys, *compress(place, tmp_path / "b"), "--plugin", tmp_path / "none.py")
    assert "There is no Python file" in line


def test_nothing_is_foreseen_where_nobody_is_told(place, tmp_path, monkeypatch):
    monkeypatch.setattr("sparlow.cli.compressing.plan", lambda *_, **__: 1 // 0)
    assert run(*compress(place, tmp_path / "out"), "--quiet") == 0
    with pytest.raises(ZeroDivisionError):
        run(*compress(place, tmp_path / "other"))
