"""Directories whose layers are in codes of few bits: as written, opened, saved again, resumed, damaged."""

import json
import re
import warnings

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from artefacts import assert_same_bits, edit, spoil, trainer
from coded import coded_model
from families import save_tiny, tiny, tiny_tokenizer
from sparlow.errors import InputError
from sparlow.model.artefact.checkpoint import CheckpointWriter, load, read_block
from sparlow.model.artefact.describe import changed_sparse_parts, count_parameters, describe, verify
from sparlow.model.artefact.dtypes import StoredDtypes
from sparlow.model.artefact.hf_quantizer import attach
from sparlow.model.artefact.layers import compressed_layers
from sparlow.model.artefact.schemes import from_config, longest_codes, packed_shapes
from sparlow.model.forward.decoder import Decoder

LAYER = "model.layers.1.mlp.up_proj"  # (48, 32)
SHARD = "model-00002-of-00004.safetensors"  # that holds LAYER
CASES = [
    ("llama", torch.bfloat16, {"values": "int4", "pattern": "2:4"}),
    ("llama", torch.bfloat16, {"values": "int3", "pattern": "free", "group": 12}),
    ("llama", torch.float32, {"values": "int2", "group": "row"}),
    ("qwen2", torch.float16, {"values": "int8", "rank": 0}),
    ("gpt2", torch.float32, {"values": "int4", "levels": "integer", "pattern": "2:4"}),
    ("gemma2", torch.bfloat16, {"values": "int3", "levels": "half", "pattern": "free"}),
]


def opened_and_coded(family, dtype, folder, **options):
    save_tiny(family, folder, dtype=dtype)
    return coded_model(AutoModelForCausalLM.from_pretrained(folder), **options)


def write(model, folder, pattern="2:4", **options):
    decoder = Decoder.of(model)
    writer = CheckpointWriter(folder, model, decoder, **options)
    for i, block in enumerate(decoder.blocks):
        writer.write_block(i, block)
    writer.write_rest(model)
    writer.finish(model, tiny_tokenizer(), patterns=dict.fromkeys(compressed_layers(model), pattern))
    return folder


@pytest.fixture
def model(tmp_path_factory):
    return opened_and_coded("llama", torch.bfloat16, tmp_path_factory.mktemp("dense"), values="int3", pattern="2:4")


@pytest.fixture
def folder(model, tmp_path):
    return write(model, tmp_path / "out")


def tensors_of(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def quantization(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize(("family", "dtype", "options"), CASES)
def test_comes_back_bit_for_bit_and_is_saved_to_the_same_bytes(family, dtype, options, tmp_path):
    model = opened_and_coded(family, dtype, tmp_path / "dense", **options)
    written = write(model, tmp_path / "out")
    ids = torch.arange(2, 14)[None]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        opened = load(written)
        assert_same_bits(model, opened)
        assert torch.equal(model(ids).logits, opened(ids).logits)
        opened.save_pretrained(tmp_path / "saved")
        write(opened, tmp_path / "again")
        attach(model, dict.fromkeys(compressed_layers(model), "2:4"))
        model.save_pretrained(tmp_path / "attached")
        assert_same_bits(model, load(tmp_path / "saved"))
    assert quantization(tmp_path / "saved") == quantization(written) == quantization(tmp_path / "attached")
    for file in written.glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    for other in ("saved", "attached"):
        theirs = tensors_of(tmp_path / other)
        assert theirs.keys() == tensors_of(written).keys()
        assert all(torch.equal(t, theirs[name]) for name, t in tensors_of(written).items())
    schemes = quantization(written)["schemes"]
    assert {scheme["values"] for scheme in schemes} == {options["values"]}
    own = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    assert {scheme["decoded"] for scheme in schemes} == {own}
    assert {scheme["factors"] for scheme in schemes} == {"int8" if options.get("rank", 3) else own}
    assert all(scheme.get("transposed", False) == (family == "gpt2") for scheme in schemes)


def test_a_shard_says_the_same_whenever_it_is_written(model, tmp_path):
    """safetensors gives the keys of its metadata a random order."""
    writer = CheckpointWriter(tmp_path, model, Decoder.of(model))
    assert len({writer.write_block(0, model.model.layers[0]).sha256 for _ in range(12)}) == 1
    with safe_open(tmp_path / "model-00001-of-00004.safetensors", "pt") as shard:
        assert shard.metadata().keys() == {"format", "sparlow"}


def test_a_reader_needs_the_documentation_only(model, folder):
    tensors, about = tensors_of(folder), quantization(folder)
    for name, (number, kept) in about["layers"].items():
        scheme, layer = about["schemes"][number], model.get_submodule(name)
        assert (scheme["pattern"], scheme["values"], scheme["levels"], scheme["group"]) == ("2:4", "int3", "book", 16)
        out, features = len(tensors[f"{name}.U"]), tensors[f"{name}.V"].shape[1]
        mask = np.unpackbits(tensors[f"{name}.mask"].numpy(), axis=1, bitorder="little")[:, :features].astype(bool)
        rows = tensors[f"{name}.weight"].view(out, -1).numpy()  # of N:M all have the same length
        bits = np.unpackbits(rows, axis=1, bitorder="little")[:, : kept // out * 3].reshape(out, -1, 3)
        codes = (bits * [1, 2, 4]).sum(2)
        S = torch.zeros(out, features)
        S[torch.from_numpy(mask)] = tensors[f"{name}.book"].float()[codes].view(-1)
        S *= tensors[f"{name}.scale"].float().repeat_interleave(16, 1)[:, :features]
        assert torch.equal(S.bfloat16(), layer.S)
        assert torch.equal((tensors[f"{name}.U"].float() * tensors[f"{name}.U_scale"].float()).bfloat16(), layer.U)
        V = tensors[f"{name}.V"].float() * tensors[f"{name}.V_scale"].float()[:, None]
        assert torch.equal(V.bfloat16(), layer.V)


def test_opens_without_the_head_and_in_another_dtype(model, folder, tmp_path):
    ids = torch.arange(12)[None]
    assert torch.equal(AutoModel.from_pretrained(folder)(ids).last_hidden_state, model.model(ids).last_hidden_state)
    for dtype in (torch.float32, torch.float16):
        other = load(folder, dtype=dtype)
        layer, own = other.get_submodule(LAYER), model.get_submodule(LAYER)
        assert {p.dtype for p in other.parameters()} == {dtype}
        assert all(torch.equal(getattr(layer, part), getattr(own, part).to(dtype)) for part in "SUV")
    load(folder, dtype=torch.float32).save_pretrained(tmp_path / "wide")
    mine, theirs = tensors_of(folder), tensors_of(tmp_path / "wide")
    coded = [name for name in mine if name.startswith("model.layers") and "norm" not in name]
    assert coded
    assert all(torch.equal(mine[name], theirs[name]) for name in coded)  # no bit of them was rounded again


def test_a_model_that_computes_in_float32_writes_the_same(model, folder, tmp_path):
    storage = StoredDtypes.of(model)
    write(model.float(), tmp_path / "wide", storage=storage, computed=torch.float32)
    for file in folder.glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "wide" / file.name).read_bytes()


@pytest.mark.parametrize("pattern", ["dense", "2:4", "free"])
@pytest.mark.parametrize("values", ["int8", "int3"])
def test_a_block_comes_back_into_a_dense_one(values, pattern, tmp_path):
    model = opened_and_coded("llama", torch.bfloat16, tmp_path / "dense", values=values, pattern=pattern)
    write(model, tmp_path / "out")
    (tmp_path / "out" / "config.json").unlink()  # unfinished: nothing but the shard says what the codes mean
    block, decoder = tiny("llama", seed=5).model.layers[1], Decoder.of(model)
    read_block(tmp_path / "out" / SHARD, decoder, 1, block)
    assert_same_bits(block, model.model.layers[1])
    again = CheckpointWriter(tmp_path / "again", model, decoder)
    again.write_block(1, block)
    assert (tmp_path / "again" / SHARD).read_bytes() == (tmp_path / "out" / SHARD).read_bytes()


def test_sizes_are_those_of_the_files(model, folder):
    described = {row.name: row for row in describe(folder)}
    tensors, storage = tensors_of(folder), StoredDtypes.of(model)
    for name, layer in compressed_layers(model).items():
        size = sum(t.nbytes for key, t in tensors.items() if key.startswith(f"{name}."))
        assert described[name].bytes == size == storage.packed_bytes(layer, name)
        assert (described[name].dtype, described[name].density) == ("int3", 0.5)
        assert not described[name].outside
    weights = 48 * 32
    book, groups, rank = 2 * 8, 2, 3
    size = weights * 3 / 16 + weights / 8 + 48 * groups * 2 + book + rank * (48 + 32) + 2 * 2 * rank
    assert described[LAYER].bytes == size
    assert count_parameters(folder).compressed == sum(layer.S.numel() for layer in compressed_layers(model).values())
    assert verify(folder) == []


@pytest.mark.slow
@pytest.mark.parametrize("how", ["model", "body", "pipeline"])
def test_a_stranger_gets_an_error_and_no_random_weights(how, folder, stranger):
    said = stranger(how, folder)
    assert "OPENED" not in said
    assert "RuntimeError" in said
    assert ".weight" in said or "mismatch" in said.lower()


# Training


def test_what_is_trained_is_saved_in_floats_and_opens(folder, tmp_path):
    opened = load(folder)
    with pytest.warns(UserWarning, match="not on the grid that they were compressed to") as told:
        trainer(opened, tmp_path / "run", max_steps=3).train()
    assert len([w for w in told if "not on the grid" in str(w.message)]) == 1
    again = load(tmp_path / "run" / "checkpoint-3")
    assert_same_bits(opened, again)
    assert {s["values"] for s in quantization(tmp_path / "run" / "checkpoint-3")["schemes"]} == {"bf16"}
    resumed = load(folder)
    trainer(resumed, tmp_path / "run", max_steps=3).train(resume_from_checkpoint=True)
    assert_same_bits(opened, resumed)


def test_where_only_norms_are_trained_codes_stay_codes(folder, tmp_path):
    opened, resumed = load(folder), load(folder)
    for model in (opened, resumed):
        for name, p in model.named_parameters():
            p.requires_grad_("norm" in name)
    trainer(opened, tmp_path / "run", max_steps=3).train()
    theirs = tensors_of(tmp_path / "run" / "checkpoint-3")
    assert all(torch.equal(t, theirs[name]) for name, t in tensors_of(folder).items() if LAYER in name)
    trainer(resumed, tmp_path / "run", max_steps=3).train(resume_from_checkpoint=True)
    assert_same_bits(opened, resumed)


def test_a_sparse_part_that_changed_is_named(model, folder, tmp_path):
    write(load(folder), tmp_path / "same")
    assert changed_sparse_parts(folder, tmp_path / "same") == []
    layer = model.get_submodule(LAYER)
    values = layer.stored.values
    with torch.no_grad():
        layer.S[:, :16] *= 2  # the same codes
    object.__setattr__(values, "scale", values.scale * torch.tensor([2, 1]))
    write(model, tmp_path / "other", keep_grid=True)
    assert changed_sparse_parts(folder, tmp_path / "other") == [LAYER]


def test_a_writer_that_is_to_keep_the_grid_refuses_what_has_left_it(model, tmp_path):
    with torch.no_grad():
        model.get_submodule(LAYER).S.mul_(1.01)
    with pytest.raises(InputError, match=r"up_proj: the numbers are not on the grid"):
        write(model, tmp_path, keep_grid=True)


# Directories that are not to be trusted


@pytest.mark.parametrize(
    "change",
    [
        *({"values": "int4"}, {"values": "int2"}, {"values": "bf16"}, {"values": "int5"}, {"values": "int8"}),
        *({"levels": "half"}, {"levels": "uniform"}, {"levels": None}, {"levels": []}),
        *({"group": 64}, {"group": 0}, {"group": -16}, {"group": "16"}, {"group": True}, {"group": 2**62}),
        *({"factors": "bf16"}, {"factors": "int4"}, {"decoded": "int8"}, {"decoded": None}, {"decoded": [1]}),
        *({"pattern": "dense"}, {"pattern": "1:4"}, {"rank": 2}, {"zero": 0}, {"group": "rows"}),
    ],
)
def test_a_scheme_that_is_not_known_or_not_true_is_refused_by_the_name_of_a_layer(folder, change):
    edit(folder / "config.json", lambda config: config["quantization_config"]["schemes"][0].update(change))
    with pytest.raises(InputError, match=r"model\.layers\.\d\.\w+\.\w+"):
        load(folder)
    with pytest.raises(InputError, match=r"model\.layers\.\d\.\w+\.\w+"):
        describe(folder)


@pytest.mark.parametrize("key", ["levels", "group", "decoded", "pattern", "rank", "values"])
def test_a_scheme_that_lacks_something(folder, key):
    edit(folder / "config.json", lambda config: config["quantization_config"]["schemes"][0].pop(key))
    with pytest.raises(InputError, match=rf"model\.layers\.\d\.\w+\.\w+: Its scheme (lacks '{key}'|has)"):
        load(folder)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("weight", lambda t: t[1:], "should have the shape"),
        ("weight", lambda t: t.view(48, -1), "should have the shape"),
        ("weight", lambda t: t.view(torch.int8), "should have the shape"),
        ("weight", lambda t: t | 128, None),
        ("scale", lambda t: t[:, :1].clone(), "should have the shape"),
        ("scale", lambda t: t.float(), "should have the shape"),
        ("book", lambda t: t.flip(0), "levels of its book do not rise"),
        ("book", lambda t: t[:-1], "should have the shape"),
        ("U", lambda t: t.float(), "should have the shape"),
        ("U", lambda t: t.view(torch.uint8), "should have the shape"),
        ("V_scale", lambda t: t * float("nan"), "V_scale holds numbers that are not finite"),
        ("U_scale", lambda t: t[:0], "should have the shape"),
        ("scale", lambda t: t * 0, "keeps values that are zero"),
    ],
)
def test_damaged_layers(folder, part, change, message):
    spoil(folder / SHARD, lambda tensors: tensors.update({f"{LAYER}.{part}": change(tensors[f"{LAYER}.{part}"])}))
    if message is None:  # other codes are as good
        load(folder)
        return
    with pytest.raises(InputError, match=rf"{re.escape(LAYER)}.*{message}"):
        load(folder)
    try:
        found = verify(folder)
    except InputError as problem:
        found = [str(problem)]
    assert any(LAYER in problem and re.search(message, problem) for problem in found)


@pytest.mark.parametrize("part", ["scale", "book", "mask", "U_scale", "V_scale"])
def test_a_tensor_that_is_missing(folder, part):
    spoil(folder / SHARD, lambda tensors: tensors.pop(f"{LAYER}.{part}"))
    with pytest.raises(InputError, match=rf"{re.escape(LAYER)} should have the tensors"):
        load(folder)


@pytest.mark.parametrize("said", [None, "", "[]", "{}", "[" * 10**5, '{"schemes": [], "layers": {"a": [0, 1]}}'])
def test_a_shard_that_does_not_say_what_its_codes_mean(model, folder, said):
    tensors = load_file(folder / SHARD)
    save_file(tensors, folder / SHARD, {"format": "pt"} | ({} if said is None else {"sparlow": said}))
    with pytest.raises(InputError, match=r"does not say of which grid|is damaged"):
        read_block(folder / SHARD, Decoder.of(model), 1, tiny("llama").model.layers[1])


def test_of_a_free_pattern_the_header_bounds_the_bytes_and_the_mask_decides():
    scheme = {
        "pattern": "free",
        "values": "int3",
        "levels": "half",
        "group": 128,
        "decoded": "bf16",
        "rank": 0,
        "factors": "bf16",
    }
    record = from_config([scheme], {"a": [0, 20]})["a"]
    assert packed_shapes((8, 16), record)["weight"] == (8,)
    assert longest_codes((8, 16), record) == (20 * 3 + 7 * 8) // 8
