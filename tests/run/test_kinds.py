"""Whole runs over what is unlike a Llama: transposed weights, blocks that the text speaks to, types of their own."""

import inspect
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import sparlow
from families import _SIZES, linears, save_tiny, tiny
from samples import few_of
from sparlow.algorithms import _registry, pruner
from sparlow.errors import InputError
from sparlow.evaluation.perplexity import require_context
from sparlow.linalg.gram import Gram
from sparlow.model.artefact.layers import compressed_layers
from sparlow.model.forward.decoder import Decoder
from sparlow.model.loading.source import open_model
from sparlow.recipe.allocation import Rule
from sparlow.recipe.recipe import Recipe
from sparlow.run.verify import verify_artefact

WINDOWS = torch.randint(2, 97, (10, 16), generator=torch.Generator().manual_seed(1))
WANDA = Recipe(algorithm="wanda", samples=10, seqlen=16)
NARROW = ("altup.*_coefs",)  # of Gemma-3n: four inputs


@pytest.mark.parametrize("match", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_model_of_transposed_weights_is_compressed_written_and_opened(match, tmp_path):
    dense = save_tiny("gpt2", tmp_path / "model")
    recipe = Recipe(rank=4, samples=10, seqlen=16, options={"effort": 0.1}, match=match)
    report = sparlow.compress(
        tmp_path / "model", recipe, calibration=WINDOWS, evaluate=("builtin",), limit=4, out=tmp_path / "out"
    )
    assert [layer.name for layer in report.layers] == ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"] * 3
    assert [layer.shape for layer in report.layers[:4]] == [(96, 32), (32, 32), (48, 32), (32, 48)]
    assert all(layer.density == 0.5 for layer in report.layers)
    assert not [row for row in report.not_compressed if "Conv1D" in row["why"]]
    assert verify_artefact(tmp_path / "out") == []
    loaded = sparlow.load(tmp_path / "out")
    assert compressed_layers(loaded).keys() == {name for name, _ in Decoder.of(dense).layers()}
    in_memory = tiny("gpt2")
    again = sparlow.compress(in_memory, recipe, calibration=WINDOWS, evaluate=(), inplace=True)
    assert [x.relative_error for x in again.layers] == pytest.approx([x.relative_error for x in report.layers])
    with torch.no_grad():
        torch.testing.assert_close(in_memory(WINDOWS).logits, loaded(WINDOWS).logits, rtol=1e-4, atol=1e-4)
        opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert torch.equal(opened(WINDOWS).logits, loaded(WINDOWS).logits)
    tokenizer = open_model(str(tmp_path / "model")).tokenizer
    for model, found in ((dense, report.dense), (loaded, report.compressed)):
        measured = sparlow.evaluate(model, tokenizer, seqlen=16, limit=4)["perplexity"]
        assert measured == pytest.approx(found["perplexity"], rel=1e-5)


def test_what_is_kept_of_a_transposed_weight_is_what_the_definition_says():
    """Magnitude pruning at 2:4 along the inputs, by hand."""
    dense, model = tiny("gpt2"), tiny("gpt2")
    recipe = Recipe(algorithm="magnitude", pattern="2:4")
    sparlow.compress(model, recipe, calibration=WINDOWS, evaluate=(), inplace=True)
    for name, layer in compressed_layers(model).items():
        W = dense.get_submodule(name).weight.detach().T  # (out, in)
        groups = W.reshape(len(W), -1, 4)
        kept = groups.abs().argsort(-1).argsort(-1) >= 2
        assert torch.equal(layer.sparse_weight(), (groups * kept).reshape(W.shape))
        assert torch.equal(layer.bias, dense.get_submodule(name).bias)


PLAIN, WHOLE, BLOCKS = WANDA, WANDA.changed(match=True), WANDA.changed(match=True, match_preset="blocks")


@pytest.mark.parametrize(
    ("family", "recipe"),
    few_of(
        product(["gemma4_text", "gemma3n_text"], [PLAIN, WHOLE, BLOCKS]),
        ("gemma4_text", WHOLE),
    ),
)
def test_blocks_that_depend_on_the_text_or_share_what_they_write(family, recipe, tmp_path):
    dense = save_tiny(family, tmp_path / "model")
    recipe = recipe.changed(ignore=NARROW if family == "gemma3n_text" else ())
    text = {"evaluate": ("builtin",), "limit": 130}  # more than passes through a block at a time
    report = sparlow.compress(tmp_path / "model", recipe, calibration=WINDOWS, out=tmp_path / "out", **text)
    tokenizer = open_model(str(tmp_path / "model")).tokenizer
    for model, found in ((dense, report.dense), (sparlow.load(tmp_path / "out"), report.compressed)):
        measured = sparlow.evaluate(model, tokenizer, seqlen=16, limit=130)["perplexity"]
        assert measured == pytest.approx(found["perplexity"], rel=1e-5)
    assert verify_artefact(tmp_path / "out") == []
    assert all(row["loss_after"] <= row["loss_before"] for row in report.matching)


def test_what_later_blocks_are_calibrated_on_comes_from_the_compressed_blocks_before():
    """The last block of a Gemma-4 attends to keys of a block that was compressed: its statistics are seen by hand."""
    model, dense = tiny("gemma4_text"), tiny("gemma4_text")
    report = sparlow.compress(model, WANDA, calibration=WINDOWS, evaluate=(), inplace=True)
    half = tiny("gemma4_text")
    for i in range(3):
        Decoder.of(half).blocks[i] = Decoder.of(model).blocks[i]
    name, seen = "self_attn.o_proj", []
    handle = Decoder.of(half).blocks[3].get_submodule(name).register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    with torch.no_grad():
        half(WINDOWS, use_cache=False)
    handle.remove()
    X = torch.cat(seen).flatten(0, -2).double()
    H = (2 / len(WINDOWS) * X.T @ X).float()
    W = Decoder.of(dense).blocks[3].get_submodule(name).weight.detach()
    residual = W - compressed_layers(model)[f"{Decoder.of(model).label(3)}.{name}"].sparse_weight()
    gram = Gram.damped(H, absolute=WANDA.damping, relative=WANDA.relative_damping)
    (record,) = [layer for layer in report.layers if (layer.block, layer.name) == (3, name)]
    assert record.relative_error == pytest.approx(gram.relative_error(W, residual), rel=1e-4)


def test_weights_that_blocks_share_are_refused_before_they_are_read(tmp_path):
    save_tiny("zamba", tmp_path / "model")
    for file in (tmp_path / "model").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(InputError, match="is shared with another layer"):
        sparlow.compress(tmp_path / "model", WANDA, calibration=WINDOWS, evaluate=(), out=tmp_path / "out")
    with pytest.raises(InputError, match="is shared with another layer"):
        sparlow.plan(tmp_path / "model", WANDA)


def test_blocks_that_give_each_other_more_than_their_state_are_refused_before_weights_are_read(tmp_path):
    sizes = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "q_lora_rank": 16}
    sizes |= {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "index_topk": 4}
    sizes |= {"index_n_heads": 2, "index_head_dim": 16, "head_dim": 8, "num_key_value_heads": 4}
    sizes |= {"indexer_types": ["full", "shared", "shared"]}
    AutoConfig.for_model("glm_moe_dsa", **(_SIZES | sizes)).save_pretrained(tmp_path / "model")
    for run in (
        lambda: sparlow.compress(tmp_path / "model", WANDA, calibration=WINDOWS, evaluate=(), out=tmp_path / "out"),
        lambda: sparlow.plan(tmp_path / "model", WANDA),
    ):
        with pytest.raises(InputError, match="depends on what the blocks before it compute"):
            run()


def untouched(kind, **changes):
    """A model of a type that the families of these tests lack, as transformers initialises it."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **changes)).eval()


def test_a_model_in_memory_whose_code_moves_a_table_to_the_device_of_the_tokens_keeps_it():
    sizes = {"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 64}
    model = untouched("gptj", **sizes)
    tables = {name: table.clone() for name, table in model.named_buffers()}
    assert any(name.endswith("embed_positions") for name in tables)
    sparlow.compress(model, WANDA, calibration=WINDOWS, evaluate=(), inplace=True)
    assert all(torch.equal(table, tables[name]) for name, table in model.named_buffers())


def test_a_model_that_exchanges_modules_of_its_blocks_while_it_runs_is_refused(tmp_path):
    sizes = {"is_decoder": True, "attention_type": "block_sparse", "pad_token_id": 1}
    untouched("big_bird", **(_SIZES | sizes)).save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="replaces modules of its blocks"):
        sparlow.compress(tmp_path / "model", WANDA, calibration=WINDOWS, evaluate=(), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_whose_config_does_not_say_how_many_blocks_it_has_is_refused(monkeypatch):
    model = tiny("llama")
    monkeypatch.setattr(type(model.config), "get_text_config", lambda _: SimpleNamespace(hidden_size=32))
    with pytest.raises(InputError, match="has no num_hidden_layers"):
        Decoder.of(model)


def test_a_model_that_says_minus_one_for_its_longest_text_reads_any():
    model = tiny("llama")
    model.config.max_position_embeddings = -1
    require_context(model, 10**6)
    model.config.max_position_embeddings = 16
    with pytest.raises(InputError, match="at most 16 tokens"):
        require_context(model, 17)


@pytest.fixture
def mixed(tmp_path):
    """A bfloat16 model with a float32 linear layer in each block, on disk, and its float32 weights."""
    config = AutoConfig.for_model("hunyuan_v1_moe", **(_SIZES | {"num_experts": 8, "moe_topk": 2, "head_dim": 8}))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    exact = {n: m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.weight.dtype.itemsize == 4}
    assert len(exact) == 3
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model", exact


def test_a_layer_is_stored_in_the_type_of_its_weight(mixed, tmp_path):
    folder, exact = mixed
    rules = [Rule(name, pattern="2:4") for name in exact]  # a router stays dense unless a rule names it
    recipe = Recipe(algorithm="magnitude", layers=rules)
    sparlow.compress(folder, recipe, calibration=WINDOWS, evaluate=(), out=tmp_path / "out")
    layers = compressed_layers(sparlow.load(tmp_path / "out"))
    for shard in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                layer, _, part = name.rpartition(".")
                if part in ("weight", "U", "V"):
                    wanted = torch.float32 if layer in exact else torch.bfloat16
                    assert file.get_tensor(name).dtype == wanted, name
    for name, W in exact.items():
        S = layers[name].sparse_weight()
        assert S.dtype == torch.float32
        assert torch.equal(S[S != 0], W.detach()[S != 0])  # not rounded on the way


def frames_of_ours():
    """Functions of src/sparlow that are being executed, from the one that has the calibration windows as a tensor in a
    variable of its own, ``sparlow.compress``, to the caller of this one, a pruner, which is counted as well.
    """
    package = str(Path(sparlow.__file__).parent)
    stack = inspect.stack()[1:]
    start = max(i for i, frame in enumerate(stack) if isinstance(frame.frame.f_locals.get("windows"), torch.Tensor))
    return [stack[0].function, *(f.function for f in stack[1 : start + 1] if f.filename.startswith(package))]


def test_from_the_windows_to_the_pruner_there_are_six_functions(monkeypatch):
    seen = []
    monkeypatch.setattr(_registry, "_ALGORITHMS", dict(_registry._ALGORITHMS))

    @pruner("looks-around")
    def looks_around(W, gram, pattern):  # noqa: ARG001 - a pruner's signature
        """Look who called."""
        seen.append(frames_of_ours())
        return W * pattern.mask(W.abs())

    sparlow.compress(tiny("llama"), Recipe(algorithm="looks-around"), calibration=WINDOWS, evaluate=(), inplace=True)
    assert seen[0] == ["looks_around", "solve", "compress_block", "walk", "go", "compress"]
    assert max(map(len, seen)) == 6


def test_opening_does_not_look_through_the_model_once_a_layer(tmp_path, monkeypatch):
    looks = {}
    plain = nn.Module.named_modules
    for family, depth in (("llama", 3), ("gemma2", 4)):
        model = save_tiny(family, tmp_path / family)
        sparlow.compress(tmp_path / family, WANDA, calibration=WINDOWS, evaluate=(), out=tmp_path / f"{family}-out")
        layers = sum(len(linears(block)) for block in Decoder.of(model).blocks)
        assert layers == 7 * depth
        count = 0

        def counted(self, *args, **options):
            nonlocal count
            count += isinstance(self, type(model))  # noqa: B023 - called in this round
            return plain(self, *args, **options)

        monkeypatch.setattr(nn.Module, "named_modules", counted)
        sparlow.load(tmp_path / f"{family}-out")
        monkeypatch.setattr(nn.Module, "named_modules", plain)
        looks[layers] = count
    assert looks[21] == looks[28]
