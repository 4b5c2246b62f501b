"""S in words of 32 bits, as compressed-tensors reads them: unpacked here by a restatement."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import sparlow
from coded import two_of_four
from command_line import run_and_fail
from results import logits, write_result
from sparlow.exporting.compressed_tensors import pack_words
from sparlow.files import CONFIG


def unpacked(tensors, bits):
    """Restated from compressed-tensors: element i of a row has the bits i·b … of its words, shifted by 2^(b−1)."""
    (out, columns), words = tensors["weight_shape"].tolist(), tensors["weight_packed"]
    assert words.dtype == torch.int32
    rows = []
    for row in words.tolist():
        number = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(row))
        rows.append([((number >> (bits * i)) & ((1 << bits) - 1)) - (1 << (bits - 1)) for i in range(columns)])
    codes, scale = torch.tensor(rows, dtype=torch.int8), tensors["weight_scale"]
    assert codes.shape == (out, columns)
    return codes.to(scale.dtype) * scale.repeat_interleave(columns // scale.shape[1], 1)


def layers_of(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            layer, _, part = name.rpartition(".")
            found.setdefault(layer, {})[part] = tensor
    return {name: parts for name, parts in found.items() if "weight_packed" in parts}


def bits_of(folder):
    groups = json.loads((folder / CONFIG).read_text())["quantization_config"]["config_groups"]
    return {(g["weights"]["num_bits"], g["weights"]["group_size"]): g["targets"] for g in groups.values()}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [8, 9, 32, 33])
def test_words_hold_every_code_where_it_belongs(bits, columns):
    largest = (1 << (bits - 1)) - 1
    codes = torch.randint(-largest, largest + 1, (5, columns), generator=torch.Generator().manual_seed(0)).to(
        torch.int8
    )
    tensors = {"weight_packed": pack_words(codes, bits), "weight_shape": torch.tensor(codes.shape)}
    assert tensors["weight_packed"].shape == (5, -(-columns * bits // 32))
    assert torch.equal(unpacked(tensors | {"weight_scale": torch.ones(5, 1)}, bits), codes.float())


FORMS = {  # values, pattern, levels, group → bits and columns a scale, in 32 and 48 columns
    ("int8", "2:4", "integer", 16): {(8, 16)},
    ("int4", "2:4", "integer", 32): {(4, 16)},  # of 48 columns, 16 is the largest part of 32; one for all
    ("int4", "dense", "integer", "row"): {(4, None)},
    ("int3", "dense", "integer", 16): {(4, 16)},
    ("int3", "free", "half", 16): {(4, 16)},
    ("int2", "dense", "half", 16): {(4, 16)},
}


@pytest.mark.parametrize(
    ("form", "expected"), FORMS.items(), ids=lambda x: "-".join(map(str, x if isinstance(x, tuple) else ""))
)
def test_s_is_kept_bit_for_bit(form, expected, tmp_path):
    dtype = (torch.bfloat16, torch.float32, torch.float16)[[*FORMS].index(form) % 3]
    values, pattern, levels, group = form
    options = {"values": values, "pattern": pattern, "levels": levels, "group": group}
    write_result(tmp_path / "in", "qwen2", dtype=dtype, blocks=1, **options)
    sparlow.export(tmp_path / "in", tmp_path / "out", form="compressed-tensors")
    found, model = layers_of(tmp_path / "out" / "base"), sparlow.load(tmp_path / "in")
    assert set(bits_of(tmp_path / "out" / "base")) == expected
    inner = {name: m for name, m in model.named_modules() if hasattr(m, "low_rank_weight")}
    assert found.keys() == inner.keys()
    for name, layer in inner.items():
        S = unpacked(found[name], 8 if values == "int8" else 4)
        assert torch.equal(S, layer.S), name
        assert ("bias" in found[name]) == (layer.bias is not None)
        assert "weight" not in found[name]
    config = json.loads((tmp_path / "out" / "base" / CONFIG).read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert config["ignore"] == ["lm_head"]
    if pattern == "2:4":
        zeros = unpacked(found["model.layers.0.self_attn.q_proj"], 8 if values == "int8" else 4) == 0
        assert torch.equal(~zeros, two_of_four((32, 32), 0))


def test_layers_of_any_width_share_one_group_so_that_transformers_opens_all_of_them(tmp_path):
    """Transformers 5.23 opens all layers in floats by the first group that it finds."""
    write_result(tmp_path / "in", values="int4", levels="integer", group=32, pattern="dense", ranks=(0,), blocks=1)
    found = sparlow.export(tmp_path / "in", tmp_path / "out", form="compressed-tensors")
    assert bits_of(tmp_path / "out") == {(4, 16): ["Linear"]}  # no adapter, so no base inside
    assert any("16 columns have no kernels" in note for note in found.notes)


def test_layers_of_two_sizes_are_named_apart_and_this_is_said(tmp_path):
    options = {"values": "int4", "levels": "integer", "group": 16, "pattern": "dense", "ranks": (0,)}
    write_result(tmp_path / "in", others={"down_proj": {"values": "int8"}}, **options)
    found = sparlow.export(tmp_path / "in", tmp_path / "out", form="compressed-tensors")
    groups = bits_of(tmp_path / "out")
    assert groups[8, 16] == ["re:.*\\.down_proj$"]
    assert len(groups[4, 16]) == 6
    assert any("transformers cannot open the base for PEFT; vLLM can" in note for note in found.notes)


def test_levels_that_are_not_whole_are_refused_or_rounded_when_asked(tmp_path, capsys):
    said = {
        "half": ("int4", "levels half, and other programs know whole levels only. Compress with --levels integer"),
        "book": ("int3", "levels book, and other programs know whole levels only. Compress with --levels integer"),
        "model": ("model", "are fp32, on no grid .* Compress with --values int4 --levels integer, or add"),
    }
    for levels, (values, message) in said.items():
        folder = tmp_path / levels
        write_result(folder, values=values, blocks=1, **({} if values == "model" else {"levels": levels, "group": 16}))
        with pytest.raises(sparlow.InputError, match=message):
            sparlow.export(folder, tmp_path / "out", form="compressed-tensors")
        options = {"round": "int8"}
        found = sparlow.export(folder, tmp_path / f"{levels}-8", form="compressed-tensors", options=options)
        assert any("rounded" in note for note in found.notes) == (levels != "half")
        model, packed = sparlow.load(folder), layers_of(tmp_path / f"{levels}-8" / "base")
        for name, parts in packed.items():
            S, near = model.get_submodule(name).S, unpacked(parts, 8)
            assert (S - near).abs().max() <= (0 if levels == "half" else S.abs().max() / 250), name
            assert torch.equal(S == 0, near == 0) or values == "model"
    assert not (tmp_path / "out").exists()
    arguments = ("export", tmp_path / "half", "--out", tmp_path / "out", "--as", "compressed-tensors")
    assert "--levels integer" in run_and_fail(capsys, *arguments)
    assert "expected no | int8 | int4" in run_and_fail(capsys, *arguments, "--option", "round=int3")


def test_a_model_of_transposed_weights_is_refused(tmp_path):
    write_result(tmp_path / "in", "gpt2", values="int4", levels="integer", group=16)
    with pytest.raises(sparlow.InputError, match=r"stored as \(in, out\) .* Export merged"):
        sparlow.export(tmp_path / "in", tmp_path / "out", form="compressed-tensors")


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "opt"])
def test_transformers_opens_it_with_the_package_itself(family, tmp_path):
    pytest.importorskip("compressed_tensors")
    pytest.importorskip("peft")
    write_result(tmp_path / "in", family, values="int4", levels="integer", group=16)
    sparlow.export(tmp_path / "in", tmp_path / "out", form="compressed-tensors")
    expected = logits(sparlow.load(tmp_path / "in"))
    assert torch.allclose(logits(sparlow.open_adapter(tmp_path / "out")), expected, atol=1e-4)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base")
    assert not torch.allclose(logits(base), expected, atol=1e-2)
