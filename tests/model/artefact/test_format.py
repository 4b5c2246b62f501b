"""Format 2 as docs/format.md says it: read by code of its own, and met by programs that have never heard of sparlow."""

import json
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import sparlow
from families import save_tiny, tiny
from sparlow.model.artefact.layers import compressed_layers
from sparlow.recipe.recipe import Recipe

WINDOWS = torch.randint(2, 97, (4, 16), generator=torch.Generator().manual_seed(0))
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def written(family, folder, *, dtype=torch.float32, **recipe):
    """Compress a tiny model into a directory."""
    save_tiny(family, folder / "dense", dtype=dtype)
    given = {"algorithm": "magnitude", "pattern": "2:4"} | recipe
    sparlow.compress(folder / "dense", Recipe(**given), calibration=WINDOWS, out=folder / "out", evaluate=())
    return folder / "out"


# A reader of its own


def read(folder):
    """S, U and V of every layer, by docs/format.md and nothing of sparlow."""
    about = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert about.keys() == {"quant_method", "format", "schemes", "layers"}
    assert (about["quant_method"], about["format"]) == ("sparlow", 2)
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return {
        name: read_layer(tensors, name, about["schemes"][number], kept)
        for name, (number, kept) in about["layers"].items()
    }


def read_layer(tensors, name, scheme, kept):
    weight, U, V = (tensors[f"{name}.{part}"] for part in ("weight", "U", "V"))
    out, features, rank = len(U), V.shape[1], scheme["rank"]
    assert (weight.dtype, U.dtype, V.dtype) == (TYPES[scheme["values"]], *[TYPES[scheme["factors"]]] * 2)
    assert (weight.shape, U.shape, V.shape) == ((kept,), (out, rank), (rank, features))
    S = torch.zeros(out, features, dtype=weight.dtype)
    if scheme["pattern"] == "dense":
        assert f"{name}.mask" not in tensors
        return weight.view(out, features), U, V
    mask = tensors[f"{name}.mask"].numpy()
    assert mask.shape == (out, -(-features // 8))
    kept_at = np.unpackbits(mask, axis=1, bitorder="little")[:, :features].astype(bool)
    S[torch.from_numpy(kept_at)] = weight
    if ":" in scheme["pattern"]:
        n, m = map(int, scheme["pattern"].split(":"))
        assert (kept_at.reshape(-1, m).sum(1) == n).all()
        start = out // 2 * features // m * n  # a row is found without the rows before it
        assert torch.equal(weight[start : start + features // m * n], S[out // 2][torch.from_numpy(kept_at[out // 2])])
    return S, U, V


@pytest.mark.parametrize(
    ("family", "dtype", "recipe", "patterns"),
    [
        ("llama", torch.bfloat16, {"algorithm": "3basil", "rank": 3, "options": {"max_steps": 3}}, {"2:4"}),
        ("llama", torch.float16, {"pattern": "0.5"}, {"free"}),
        ("llama", torch.float32, {"pattern": "0.0"}, {"dense"}),
        ("gpt2", torch.float32, {}, {"2:4"}),
    ],
)
def test_the_documented_format_is_all_a_reader_needs(family, dtype, recipe, patterns, tmp_path):
    folder = written(family, tmp_path, dtype=dtype, **recipe)
    layers, found = compressed_layers(sparlow.load(folder)), read(folder)
    assert found.keys() == layers.keys()
    for name, parts in found.items():
        for mine, theirs in zip(parts, (layers[name].S, layers[name].U, layers[name].V), strict=True):
            assert torch.equal(mine, theirs)
    schemes = json.loads((folder / "config.json").read_text())["quantization_config"]["schemes"]
    assert {scheme["pattern"] for scheme in schemes} == patterns
    assert all(scheme.get("transposed", False) == (family == "gpt2") for scheme in schemes)
    assert sparlow.load(folder).config.quantization_config.to_dict()["schemes"] == schemes


def test_all_of_two_of_four_costs_nine_bits_and_all_kept_no_mask(tmp_path):
    folder = written("llama", tmp_path, pattern="0.0")
    with safe_open(folder / "model-00001-of-00004.safetensors", framework="pt") as shard:
        names = set(shard.keys())
        assert shard.get_slice("model.layers.0.mlp.up_proj.weight").get_shape() == [48 * 32]
    assert not any(name.endswith(".mask") for name in names)
    sparlow.load(folder).save_pretrained(tmp_path / "again")
    assert read(tmp_path / "again").keys() == read(folder).keys()
    report = json.loads((folder / "report.json").read_text())
    assert report["bits_per_weight"] == 32


def test_the_format_and_the_solvers_decide_whether_a_run_goes_on_and_not_the_release(tmp_path, monkeypatch):
    folder = written("llama", tmp_path)
    state = json.loads((folder / "sparlow.json").read_text())
    assert state["fingerprint"].keys() == {"recipe", "model", "calibration", "format", "solver"}
    assert state["fingerprint"]["format"] == 2
    (folder / "sparlow.json").write_text(json.dumps(state | {"finished": False}))
    monkeypatch.setattr("sparlow.machine.own_version", lambda: "99.9.9")
    again = {"calibration": WINDOWS, "out": folder, "evaluate": ()}
    recipe = Recipe(algorithm="magnitude", pattern="2:4")
    before = {shard: shard.stat().st_mtime_ns for shard in folder.glob("model-0000[123]*")}
    sparlow.compress(tmp_path / "dense", recipe, **again)
    assert before == {shard: shard.stat().st_mtime_ns for shard in before}  # no block was done again
    (folder / "sparlow.json").write_text(json.dumps(state | {"finished": False}))
    monkeypatch.setattr("sparlow.run.job.REVISION", state["fingerprint"]["solver"] + 1)
    with pytest.raises(sparlow.InputError, match="holds a run with the solvers of revision"):
        sparlow.compress(tmp_path / "dense", recipe, **again)


def test_weights_keep_their_pattern_on_record_when_they_are_saved_again(tmp_path):
    folder = written("llama", tmp_path)
    opened = sparlow.load(folder)
    opened.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        opened.get_submodule("model.layers.0.mlp.up_proj").S[0] = 0
    opened.save_pretrained(tmp_path / "changed")
    about = {
        f: json.loads((tmp_path / f / "config.json").read_text())["quantization_config"] for f in ("again", "changed")
    }
    assert about["again"] == json.loads((folder / "config.json").read_text())["quantization_config"]
    number, kept = about["changed"]["layers"]["model.layers.0.mlp.up_proj"]
    assert (about["changed"]["schemes"][number]["pattern"], kept) == ("free", 47 * 16)
    read(tmp_path / "changed")


def test_a_layer_whose_name_ends_like_another_is_left_alone(tmp_path):
    """Names of layers must not match within names of others: only layer 1 of eleven is compressed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = tiny("llama").config.to_dict() | {"num_hidden_layers": 12}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    others = [f"layers.{i}.mlp.up_proj" for i in range(12) if i != 1]
    recipe = Recipe(algorithm="magnitude", pattern="2:4", ignore=["self_attn.*", "gate_proj", "down_proj", *others])
    sparlow.compress(model, recipe, calibration=WINDOWS, out=tmp_path / "out", evaluate=())
    assert list(compressed_layers(sparlow.load(tmp_path / "out"))) == ["model.layers.1.mlp.up_proj"]


# Programs that have never heard of sparlow


@pytest.fixture(scope="module")
def unknown(tmp_path_factory):
    """A compressed model of each pattern, for reading only."""
    return {
        pattern: written("llama", tmp_path_factory.mktemp("unknown"), dtype=torch.bfloat16, pattern=pattern)
        for pattern in ("2:4", "0.0")
    }


@pytest.mark.parametrize("how", ["model", "body", "pipeline"])
@pytest.mark.parametrize("pattern", ["2:4", "0.0"])
def test_a_stranger_gets_an_error_and_no_random_weights(how, pattern, unknown, stranger):
    said = stranger(how, unknown[pattern])
    assert "OPENED" not in said
    assert said.split()[0] in ("RuntimeError", "ValueError")  # a pipeline wraps the one in the other
    assert "RuntimeError" in said
    assert ".weight" in said or "mismatch" in said.lower()


# The loader that a directory may bring

TRUSTING = """
import sys, torch, transformers
transformers.utils.logging.set_verbosity_error()
how, folder = sys.argv[1:]
try:
    if how == "pipeline":
        model = transformers.pipeline("text-generation", folder, trust_remote_code=True).model
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    print("logits", model(torch.arange(12)[None]).logits.sum().item())
except ImportError as error:
    print("ImportError", str(error).replace(chr(10), " "))
"""
WITHOUT_SPARLOW = """
import sys
class Hidden:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "sparlow":
            raise ImportError("No module named 'sparlow'")
sys.meta_path.insert(0, Hidden())
"""


@pytest.fixture(scope="module")
def with_loader(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loader")
    save_tiny("llama", folder / "dense")
    recipe = Recipe(algorithm="magnitude", pattern="2:4")
    sparlow.compress(folder / "dense", recipe, calibration=WINDOWS, out=folder / "out", evaluate=(), with_loader=True)
    return folder / "out"


@pytest.mark.parametrize("how", ["model", "pipeline"])
def test_the_loader_opens_the_model_where_nobody_imports_sparlow(how, with_loader, stranger):
    expected = sparlow.load(with_loader)(torch.arange(12)[None]).logits.sum().item()
    said = stranger(how, with_loader, TRUSTING, sys.path)
    assert said.startswith("logits"), said
    assert float(said.split()[1]) == pytest.approx(expected, rel=1e-5)


def test_the_loader_names_the_package_that_is_missing(with_loader, stranger):
    said = stranger("model", with_loader, WITHOUT_SPARLOW + TRUSTING, sys.path)
    assert said.startswith("ImportError")
    assert "sparlow" in said


def test_a_directory_with_the_loader_is_like_any_other(with_loader, tmp_path, stranger):
    assert len((with_loader / "modeling_sparlow.py").read_text().splitlines()) == 3
    assert json.loads((with_loader / "config.json").read_text())["auto_map"] == {
        "AutoModelForCausalLM": "modeling_sparlow.LlamaForCausalLM"
    }
    said = stranger("model", with_loader)
    assert said.startswith("RuntimeError")
    opened = sparlow.load(with_loader)
    assert type(opened).__module__.startswith("transformers.")
    opened.save_pretrained(tmp_path / "again")
    assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text())  # the file is not there
    sparlow.load(tmp_path / "again")


def test_no_loader_is_written_unless_it_is_asked_for(tmp_path):
    folder = written("llama", tmp_path)
    assert not (folder / "modeling_sparlow.py").exists()
    assert "auto_map" not in json.loads((folder / "config.json").read_text())
