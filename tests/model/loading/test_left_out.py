"""Parts of a checkpoint that have no place in the result are kept as files, or named with their size."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import sparlow
from families import save_tiny
from sparlow.model.loading.left_out import left_out
from sparlow.model.loading.source import open_model
from sparlow.recipe.recipe import Recipe

WINDOWS = torch.randint(2, 97, (4, 16), generator=torch.Generator().manual_seed(0))
MAGNITUDE = Recipe(algorithm="magnitude", pattern="2:4")
BESIDE = {
    "LICENSE": "Do what you like.",
    "LICENSE-MIT.txt": "MIT",
    "NOTICE": "Copyright",
    "preprocessor_config.json": "{}",
    "processor_config.json": '{"processor_class": "X"}',
    "chat_template.json": '{"chat_template": "x"}',
}


@pytest.fixture
def dense(tmp_path):
    """A model whose checkpoint has a head for a further token, old buffers, and files beside the weights."""
    folder = tmp_path / "dense"
    save_tiny("llama", folder)
    tensors = load_file(folder / "model.safetensors")
    tensors |= {"mtp.layers.0.weight": torch.ones(32, 32), "vision_tower.x.weight": torch.ones(8, 4)}
    tensors |= {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "mtp.positions": torch.arange(9)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for name, text in BESIDE.items():
        (folder / name).write_text(text)
    for name in ("README.md", "trainer_state.json", "modeling_x.py", "model.onnx", ".gitattributes"):
        (folder / name).write_text("x")
    return folder


def said(sentences):
    (tensors,) = [s for s in sentences if "parameters" in s]
    (files,) = [s for s in sentences if "not copied" in s]
    assert "1,056 parameters in 2 stored tensors are not part of the result" in tensors
    assert "mtp.layers (1,024)" in tensors
    assert "vision_tower.x (32)" in tensors
    assert "inv_freq" not in tensors
    assert files.endswith(": trainer_state.json.")


@pytest.mark.parametrize("streamed", [True, False])
def test_lost_towers_and_heads_are_named_with_their_parameters(dense, streamed):
    opened = open_model(str(dense), streamed=streamed)
    assert (opened.on_disk is not None) == streamed
    said(opened.warnings)


def test_the_report_and_the_plan_tell_of_lost_parts(dense, tmp_path):
    report = sparlow.compress(dense, MAGNITUDE, calibration=WINDOWS, out=tmp_path / "out", evaluate=())
    said(report.warnings)
    said(json.loads((tmp_path / "out" / "report.json").read_text())["warnings"])
    said(sparlow.plan(dense, MAGNITUDE.changed(samples=4, seqlen=16), evaluate=(), timed=False).notes)
    for name, text in BESIDE.items():
        assert (tmp_path / "out" / name).read_text() == text
    for name in ("trainer_state.json", "modeling_x.py", "model.onnx", ".gitattributes"):
        assert not (tmp_path / "out" / name).exists()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt", "mixtral"])
def test_nothing_is_said_of_a_whole_checkpoint(family, tmp_path):
    save_tiny(family, tmp_path)
    assert left_out(open_model(str(tmp_path)).model, str(tmp_path)) == []
