"""Every summary says how much of the model its figures speak of, and what the whole file takes."""

import json
from math import prod

import pytest
import torch
from safetensors import safe_open

import sparlow
from command_line import run
from families import save_tiny, tiny
from samples import few_of
from sparlow.model.forward.decoder import Decoder
from sparlow.recipe.recipe import Recipe
from sparlow.report.html_page import html

WINDOWS = torch.randint(2, 97, (4, 16), generator=torch.Generator().manual_seed(1))
RECIPE = Recipe(algorithm="magnitude", pattern="2:4", samples=4, seqlen=16)


def tensors(folder):
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - a file is no dict
                yield name, file.get_tensor(name)


@pytest.mark.parametrize("family", few_of(["llama", "mixtral", "qwen2_moe", "jetmoe"], "llama", "mixtral"))
def test_the_share_that_is_compressed_and_the_bits_of_the_whole_file_are_said_everywhere(family, tmp_path, capsys):
    model = save_tiny(family, tmp_path / "dense", dtype=torch.bfloat16)
    out = tmp_path / "out"
    report = sparlow.compress(tmp_path / "dense", RECIPE, calibration=WINDOWS, evaluate=(), out=out)
    blocks = sum(p.numel() for p in Decoder.of(model).blocks.parameters())
    share = sum(prod(layer.shape) for layer in report.layers) / blocks
    stored = sum(tensor.nbytes for _, tensor in tensors(out))
    bits = 8 * stored / sum(p.numel() for p in model.parameters())
    assert report.share_compressed == pytest.approx(share)
    assert share > 0.9
    assert report.bits_per_parameter == pytest.approx(bits)
    assert report.bits_per_parameter > report.bits_per_weight
    said = json.loads((out / "report.json").read_text())
    assert (said["share_compressed"], said["bits_per_parameter"]) == (
        report.share_compressed,
        report.bits_per_parameter,
    )
    plan = sparlow.plan(tmp_path / "dense", RECIPE, timed=False, evaluate=())
    assert (plan.share_compressed, plan.bits_per_parameter) == (report.share_compressed, pytest.approx(bits))
    assert f"{share:.1%}" in html(report)
    assert f"{bits:.2f}" in html(report)
    assert run("inspect", out) == 0
    assert f"{share:.1%} of the parameters of the blocks are compressed" in capsys.readouterr().out
    assert run("inspect", out, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["share_compressed"] == pytest.approx(share)
    headers = found["bytes"] - stored
    assert found["bits_per_parameter"] == pytest.approx(bits + 8 * headers / sum(p.numel() for p in model.parameters()))


@pytest.mark.parametrize("streamed", [True, False])
def test_a_float32_layer_of_a_bfloat16_model_is_solved_and_stored_as_float32(streamed, tmp_path):
    model = tiny("hunyuan_v1_moe", dtype=torch.bfloat16)
    for block in model.model.layers:
        torch.nn.init.normal_(block.mlp.gate.float().wg.weight, std=0.2)
    model.save_pretrained(tmp_path / "dense")
    recipe = RECIPE.changed(pattern="0.5", layers=[{"match": "gate.wg", "pattern": "2:4"}])
    source = tmp_path / "dense" if streamed else model
    report = sparlow.compress(source, recipe, calibration=WINDOWS, evaluate=(), out=tmp_path / "out")
    assert [row.name for row in report.layers].count("mlp.gate.wg") == 3
    dense = {name: t for name, t in tensors(tmp_path / "dense") if name.endswith("gate.wg.weight")}
    assert {t.dtype for t in dense.values()} == {torch.float32}
    opened = sparlow.load(tmp_path / "out")
    for i, block in enumerate(opened.model.model.layers if hasattr(opened, "tokenizer") else opened.model.layers):
        S, W = block.mlp.gate.wg.S, dense[f"model.layers.{i}.mlp.gate.wg.weight"]
        assert S.dtype == torch.float32
        assert torch.equal(S[S != 0], W[S != 0])  # not rounded to bfloat16
        assert not torch.equal(S, S.bfloat16().float())
    stored = sum(tensor.nbytes for _, tensor in tensors(tmp_path / "out"))
    assert report.bytes["compressed"] == stored
