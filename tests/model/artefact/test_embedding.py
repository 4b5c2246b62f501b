"""The embedding and the head in few bits: rounded, written, opened, saved again, and refused where it cannot be."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from artefacts import assert_same_bits, edit, spoil, trainer
from coded import coded_model
from families import save_tiny, tiny
from sparlow.errors import InputError
from sparlow.linalg.grid import make_grid
from sparlow.model.artefact.checkpoint import CheckpointWriter, Written, load
from sparlow.model.artefact.describe import count_parameters, describe, in_blocks, verify
from sparlow.model.artefact.dtypes import StoredDtypes
from sparlow.model.artefact.embedding import quantise, quantised, rounded, saved_bytes, weight_bytes
from sparlow.model.artefact.hf_quantizer import attach
from sparlow.model.artefact.layers import compressed_layers
from sparlow.model.forward.decoder import Decoder
from sparlow.model.loading.weights import InMemory

IDS = torch.arange(2, 14)[None]


def opened(family, folder, dtype=torch.bfloat16):
    save_tiny(family, folder, dtype=dtype)
    return coded_model(AutoModelForCausalLM.from_pretrained(folder))


def write(model, folder, **options):
    decoder = Decoder.of(model)
    writer = CheckpointWriter(folder, model, decoder, **options)
    for i, block in enumerate(decoder.blocks):
        writer.write_block(i, block)
    writer.write_rest(model)
    writer.finish(model, patterns=dict.fromkeys(compressed_layers(model), "2:4"))
    return folder


def last_shard(folder):
    return max(folder.glob("*.safetensors"))


def rest(folder):
    return load_file(last_shard(folder))


def quantization(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


# Rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_eight_bits_err_by_half_a_step_and_four_less_than_the_largest_entry_would_have_it(dtype):
    W = torch.randn(50, 200, generator=torch.Generator().manual_seed(0)).to(dtype)
    W[3], W[4, 64:128] = 0, 0
    eight = rounded(W, make_grid("int8", "integer", "row"), dtype)
    step = W.float().abs().amax(1, keepdim=True) / 127
    error = (eight.decode(eight.encode(W)) - W.float()).abs()
    assert eight.scale.shape == (50, 1)
    assert (error <= step * (0.5 + 127 * 2**-8)).all()  # the scale is rounded, too
    grid = make_grid("int4", "half", 64)
    four = rounded(W, grid, dtype)
    assert (four.decode(four.encode(W))[3] == 0).all()
    groups = nn.functional.pad(W.float(), (0, 56)).view(50, 4, 64)
    plain = (groups.abs().amax(2) / 7.5).to(four.scale.dtype)
    naive = type(four)(grid, plain, four.levels, masked=False)
    errors = [(found.decode(found.encode(W)) - W.float()).square().sum() for found in (four, naive)]
    assert errors[0] < 0.9 * errors[1]
    assert four.scale.dtype == (dtype if dtype != torch.float32 else torch.bfloat16)


def test_four_bits_try_what_a_plain_search_tries():
    W = torch.randn(8, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = rounded(W, make_grid("int4", "half", 32), torch.bfloat16)
    for row, scale in zip(W.float(), found.scale[:, 0].float(), strict=True):

        def error(s, row=row):
            levels = torch.arange(16) - 7.5
            return ((row[:, None] - levels * s).abs().amin(1) ** 2).sum()

        best = min(error((row.abs().max() / 7.5 * clip).bfloat16().float()) for clip in torch.linspace(0.5, 1, 16))
        torch.testing.assert_close(error(scale), best)


# Round trips


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt"])  # untied; tied and scaled; transposed; padded
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_comes_back_bit_for_bit_and_is_saved_to_the_same_bytes(family, kind, tmp_path, recwarn):
    model = opened(family, tmp_path / "dense")
    names = quantise(model, kind, kind)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    written = write(model, tmp_path / "out")
    again = load(written)
    assert_same_bits(model, again)
    assert torch.equal(model(IDS).logits, again(IDS).logits)
    assert type(again.get_submodule(names[0])) is type(model.get_submodule(names[0]))
    write(again, tmp_path / "again")
    again.save_pretrained(tmp_path / "saved")
    attach(model, dict.fromkeys(compressed_layers(model), "2:4"))
    model.save_pretrained(tmp_path / "attached")
    for folder in ("saved", "attached"):
        assert_same_bits(model, load(tmp_path / folder))
        assert quantization(tmp_path / folder) == quantization(written)
    for file in written.glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    about = quantization(written)
    for name in names:
        number, kept = about["layers"][name]
        assert about["schemes"][number] == {
            "pattern": "dense",
            "values": kind,
            "rank": 0,
            "factors": "bf16",
            "decoded": "bf16",
            **({"levels": "integer", "group": "row"} if kind == "int8" else {"levels": "half", "group": 128}),
        }
        assert kept == model.get_submodule(names[0]).weight.numel()
    stored = [name for name in names if f"{name}.scale" in rest(written)]
    assert len(stored) == (1 if tied else 2)
    assert not [w for w in recwarn.list if "grid" in str(w.message)]


@pytest.mark.parametrize(("embedding", "head"), [("int8", "keep"), ("keep", "int4"), ("int4", "int8")])
def test_each_by_itself(embedding, head, tmp_path):
    model = opened("llama", tmp_path / "dense")
    before = saved_bytes(model, embedding, head)
    dense = sum(t.nbytes for t in rest(write(model, tmp_path / "plain")).values())
    quantise(model, embedding, head)
    written = write(model, tmp_path / "out")
    tensors = rest(written)
    for name, kind in (("model.embed_tokens", embedding), ("lm_head", head)):
        assert (f"{name}.scale" in tensors) == (kind != "keep")
        assert (tensors[f"{name}.weight"].dtype == torch.uint8) == (kind != "keep")
    assert dense - sum(t.nbytes for t in tensors.values()) == before
    assert_same_bits(model, load(written))


def test_tied_weights_save_their_bytes_once(tmp_path):
    model = opened("gemma2", tmp_path / "dense")
    W = model.get_input_embeddings().weight
    assert saved_bytes(model, "int8", "int8") == 2 * W.numel() - weight_bytes(tuple(W.shape), "int8")
    meta = tiny("gemma2").to("meta")  # which takes apart what was one parameter
    assert saved_bytes(meta, "int8", "int8", storage=StoredDtypes(torch.bfloat16, {})) == saved_bytes(
        model, *["int8"] * 2
    )
    assert saved_bytes(model, "keep", "keep") == 0


def test_opens_without_the_head_and_in_another_dtype(tmp_path):
    model = opened("llama", tmp_path / "dense")
    quantise(model)
    written = write(model, tmp_path / "out")
    body = AutoModel.from_pretrained(written)
    assert torch.equal(body(IDS).last_hidden_state, model.model(IDS).last_hidden_state)
    wide = load(written, dtype=torch.float32)
    assert torch.equal(wide.lm_head.weight, model.lm_head.weight.float())
    wide.save_pretrained(tmp_path / "wide")
    assert quantization(tmp_path / "wide") == quantization(written)


def test_a_model_that_computes_in_float32_writes_the_same(tmp_path):
    model = opened("gemma2", tmp_path / "dense")
    storage = StoredDtypes.of(model)
    quantise(model)
    written = write(model, tmp_path / "out")
    wide = opened("gemma2", tmp_path / "dense").float()
    quantise(wide, storage=storage)
    write(wide, tmp_path / "wide", storage=storage, computed=torch.float32)
    for file in written.glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "wide" / file.name).read_bytes()


def test_a_model_is_given_back_as_it_was_and_measured_as_it_was_written(tmp_path):
    model = opened("gemma2", tmp_path / "dense")
    before = model.get_input_embeddings().weight.clone()
    decoder = Decoder.of(model)
    with quantised(model, "int4", "int4"):
        inside = model.get_input_embeddings().weight.clone()
        write(model, tmp_path / "out")
    assert torch.equal(model.get_input_embeddings().weight, before)
    assert not torch.equal(inside, before)
    assert not hasattr(model.get_input_embeddings(), "stored")
    result = Written(lambda file: tmp_path / "out" / file, decoder, InMemory(decoder.blocks, model.dtype), model)
    with result.outside_blocks():
        assert torch.equal(model.get_output_embeddings().weight, inside)
        assert torch.equal(model.get_input_embeddings().weight, inside)
    assert torch.equal(model.get_input_embeddings().weight, before)


def test_sizes_leave_the_embedding_out_of_the_compressed_weights(tmp_path):
    model = opened("gemma2", tmp_path / "dense")
    plain = write(model, tmp_path / "plain")
    quantise(model)
    written = write(model, tmp_path / "out")
    assert count_parameters(written) == count_parameters(plain)
    found = [row for row in describe(written) if row.outside]
    W = model.get_input_embeddings().weight
    assert [(row.name, row.bytes, row.dtype) for row in found] == [
        ("model.embed_tokens", weight_bytes(tuple(W.shape), "int8"), "int8")
    ]
    assert [row for row in describe(written) if not row.outside] == describe(plain)
    assert verify(written, lambda name, _: None if "layers" in name else name) == []
    assert in_blocks(dict.fromkeys(["model.embed_tokens", "lm_head", "model.layers.0.x"])) == {"model.layers.0.x": None}


@pytest.mark.slow
def test_a_stranger_gets_an_error(tmp_path, stranger):
    """Even where nothing but the embedding is packed."""
    save_tiny("llama", tmp_path / "dense", dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    quantise(model)
    write(model, tmp_path / "out")
    said = stranger("model", tmp_path / "out")
    assert said.startswith("RuntimeError")
    assert_same_bits(model, load(tmp_path / "out"))


# Changes afterwards


def test_an_embedding_that_was_trained_is_stored_in_floats(tmp_path):
    model = opened("llama", tmp_path / "dense")
    quantise(model)
    found = load(write(model, tmp_path / "out"))
    for name, p in found.named_parameters():
        p.requires_grad_("embed" in name)
    with pytest.warns(UserWarning, match=r"model\.embed_tokens: the numbers are not on the grid"):
        trainer(found, tmp_path / "run", max_steps=3).train()
    kept = quantization(tmp_path / "run" / "checkpoint-3")["layers"]
    assert "model.embed_tokens" not in kept
    assert "lm_head" in kept
    assert_same_bits(found, load(tmp_path / "run" / "checkpoint-3"))
    resumed = load(tmp_path / "out")
    for name, p in resumed.named_parameters():
        p.requires_grad_("embed" in name)
    trainer(resumed, tmp_path / "run", max_steps=3).train(resume_from_checkpoint=True)
    assert_same_bits(found, resumed)


def test_a_vocabulary_that_was_resized_is_stored_in_floats_and_said(tmp_path):
    model = opened("gemma2", tmp_path / "dense")
    quantise(model)
    found = load(write(model, tmp_path / "out"))
    found.resize_token_embeddings(found.config.vocab_size + 3)
    with pytest.warns(UserWarning, match=r"embed_tokens.*own type"):
        found.save_pretrained(tmp_path / "resized")
    assert "model.embed_tokens" not in quantization(tmp_path / "resized")["layers"]
    assert_same_bits(found, load(tmp_path / "resized"))


# What is refused


@pytest.mark.parametrize(
    ("embedding", "head", "message"),
    [
        ("int3", "keep", "cannot be stored as int3. Give int8, int4 or keep"),
        ("int8", "keep", "one tensor, which cannot be stored as int8 and as keep"),
        ("int4", "int8", "one tensor"),
    ],
)
def test_what_cannot_be_asked_of_tied_weights(embedding, head, message):
    with pytest.raises(InputError, match=message):
        quantise(tiny("gemma2"), embedding, head)


def test_what_is_not_there_or_no_plain_matrix():
    model = tiny("llama")
    with pytest.raises(InputError, match="LlamaModel has no output head that could be stored in int8"):
        quantise(model.model)
    model.lm_head = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(InputError, match="output head lm_head of a Sequential cannot be quantised"):
        quantise(model)
    with pytest.raises(InputError, match="not in memory"):
        quantise(tiny("llama").to("meta"))
    broken = tiny("llama")
    with torch.no_grad():
        broken.lm_head.weight[3, 3] = torch.nan
    with pytest.raises(InputError, match="NaN or infinity"):
        quantise(broken)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.embed_tokens.scale"), "embed_tokens should have the tensors"),
        (lambda t: t.update({"model.embed_tokens.scale": t["model.embed_tokens.scale"] * float("nan")}), "not finite"),
        (lambda t: t["model.embed_tokens.weight"].fill_(0), "a level that is not in use"),
        (lambda t: [t.pop(k) for k in list(t) if "embed" in k], "embed_tokens should have the tensors"),
    ],
)
def test_damaged_files(change, message, tmp_path):
    model = opened("llama", tmp_path / "dense")
    quantise(model)
    written = write(model, tmp_path / "out")
    spoil(last_shard(written), change)
    with pytest.raises(InputError, match=message):
        load(written)


@pytest.mark.parametrize("change", [{"pattern": "free"}, {"rank": 3}, {"transposed": True}, {"factors": "int8"}])
def test_a_scheme_that_an_embedding_cannot_have(change, tmp_path):
    model = opened("gemma2", tmp_path / "dense")
    quantise(model)
    written = write(model, tmp_path / "out")
    number, _ = quantization(written)["layers"]["model.embed_tokens"]
    edit(written / "config.json", lambda config: config["quantization_config"]["schemes"][number].update(change))
    with pytest.raises(InputError, match="embed_tokens"):
        load(written)
