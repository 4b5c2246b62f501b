"""A GGUF file read back: by transformers' own reader of GGUF, whose way back it is, and tensor by tensor by gguf."""

import copy
import json

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers

import sparlow
from artefacts import edit
from results import byte_tokenizer, logits, write_result
from samples import few_of
from sparlow.exporting.gguf_families import FAMILIES, dealt_rows, family_of, rotary_factors, settings
from sparlow.exporting.gguf_tokenizer import tokenizer_fields
from sparlow.files import CONFIG
from sparlow.model.artefact.layers import compressed_layers
from sparlow.model.loading.source import open_model

gguf = pytest.importorskip("gguf")

NEWER = hasattr(transformers, "GgufConfig")  # which may leave weights packed unless told otherwise
READ_BY_TRANSFORMERS = ("llama", "qwen2", "qwen3", "phi3", "starcoder2", "gemma2", "gemma3")


def written(folder, family="llama", options=None, **form):
    """Write a result and its GGUF; return the model as sparlow opens it, and the reader of the file."""
    write_result(folder / "in", family, tokenizer=byte_tokenizer(), **form)
    found = sparlow.export(folder / "in", folder / "out", form="gguf", options=options or {})
    return sparlow.load(folder / "in"), gguf.GGUFReader(folder / "out" / "model.gguf"), found


def decoded(reader):
    return {t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}


def field(reader, name):
    return reader.fields[name].contents()


@pytest.mark.parametrize("family", few_of(READ_BY_TRANSFORMERS, "llama", "qwen2", "phi3", "gemma3"))
def test_transformers_reads_it_back(family, tmp_path):
    model, reader, _ = written(tmp_path, family, {"type": "f16"}, ranks=(3, 0, 9))
    config = copy.deepcopy(model.config)  # of the settings in the file, its reader leaves out some
    del config.quantization_config
    options = {"quantization_config": transformers.GgufConfig(dequantize=True)} if NEWER else {}
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file="model.gguf", config=config, dtype=torch.float32, **options
    )
    expected = logits(model, vocabulary=100)
    assert (logits(again, vocabulary=100) - expected).abs().max() < 5e-3 * expected.abs().max()
    arch, size = FAMILIES[config.model_type].arch, 8
    everywhere = family in ("phi3", "starcoder2")  # llama.cpp attends to everything there: the same within a window
    for name, value in {
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": size,
        "attention.value_length": size,
        "block_count": config.num_hidden_layers,
        "context_length": config.sliding_window if everywhere else config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "rope.dimension_count": size,
        "vocab_size": config.vocab_size,
    }.items():
        assert field(reader, f"{arch}.{name}") == value, name
    assert field(reader, f"{arch}.rope.freq_base") == pytest.approx(1e6 if family == "gemma3" else 1e4)
    norms, epsilon = ("", "norm_epsilon") if family == "starcoder2" else ("rms_", "rms_norm_eps")
    assert field(reader, f"{arch}.attention.layer_norm_{norms}epsilon") == pytest.approx(getattr(config, epsilon))
    if family == "gemma2":
        assert field(reader, "gemma2.attn_logit_softcapping") == config.attn_logit_softcapping
        assert field(reader, "gemma2.final_logit_softcapping") == config.final_logit_softcapping
    if family.startswith("gemma"):
        assert field(reader, f"{arch}.attention.sliding_window") == config.sliding_window


def test_a_window_becomes_the_context_within_which_it_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARLOW_CACHE", str(tmp_path / "cache"))
    model, reader, _ = written(tmp_path, "mistral", {"type": "f16"})
    assert field(reader, "general.architecture") == "llama"
    assert field(reader, "llama.context_length") == model.config.sliding_window == 8
    again = open_model(str(tmp_path / "out" / "model.gguf")).model.float()
    expected = logits(model, tokens=8, vocabulary=100)
    assert (logits(again, tokens=8, vocabulary=100) - expected).abs().max() < 5e-3 * expected.abs().max()


@pytest.mark.parametrize("weights", ["merged", "sparse"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_every_tensor_is_there_once_in_its_type(family, weights, tmp_path):
    model, reader, _ = written(tmp_path, family, {"weights": weights}, values="int4", group=16, ranks=(3, 0), blocks=1)
    kinds = {t.name: t.tensor_type.name for t in reader.tensors}
    assert len(kinds) == len(reader.tensors)
    assert len(kinds) == len({id(p) for p in model.parameters()}) - 2 * len(compressed_layers(model))
    for name, kind in kinds.items():
        vector = "norm" in name or name.endswith("bias")
        assert kind == ("F32" if vector else "F16" if "ffn_down" in name else "Q8_0"), name  # of 48 columns
    assert field(reader, "general.architecture") == FAMILIES[family].arch
    tied = model.config.tie_word_embeddings
    assert ("output.weight" in kinds) == (not tied)
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"LICENSE", "chat_template.jinja", "tokenizer.json"}
    assert (tmp_path / "out" / "adapter.gguf").exists() == (weights == "sparse")


@pytest.mark.parametrize(
    ("values", "levels", "kind", "exact"),
    [
        ("int8", "integer", "q8_0", True),
        ("int4", "half", "q8_0", True),
        ("int4", "integer", "q4_0", True),
        ("int3", "half", "q4_0", True),
        ("int4", "half", "q4_0", False),
        ("int3", "book", "q8_0", False),
    ],
)
def test_s_is_exact_where_its_grid_fits_into_blocks(values, levels, kind, exact, tmp_path):
    options = {"type": kind, "weights": "sparse"}
    model, reader, found = written(tmp_path, "llama", options, values=values, levels=levels, group=32, blocks=1)
    config, tensors = model.config, decoded(reader)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    same = total = 0
    for name, layer in compressed_layers(model).items():
        if layer.in_features % 32:
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        heads = heads.get(name.rpartition(".")[2])
        S = dealt_rows(layer.S, heads) if heads else layer.S
        got = tensors[names.get_name(f"{name}.weight", (".weight",))]
        assert (got - S).abs().max() <= S.abs().max() / (7 if kind == "q4_0" else 120)
        same, total = same + torch.equal(got, S.float().detach()), total + 1
    assert same == (total if exact else 0)
    assert any("hold S exactly" in note for note in found.notes) == exact


def test_the_adapter_has_one_alpha_and_the_scale_one_in_every_tensor(tmp_path):
    model, _, _ = written(tmp_path, "llama", {"weights": "sparse"}, ranks=(3, 0, 9))
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    assert field(reader, "general.type") == "adapter"
    assert field(reader, "adapter.type") == "lora"
    tensors, alpha = decoded(reader), field(reader, "adapter.lora.alpha")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
    seen = set()
    for name, layer in compressed_layers(model).items():
        named = names.get_name(f"{name}.weight", (".weight",))
        if not layer.rank:
            assert f"{named}.lora_a" not in tensors
            continue
        A, B = tensors[f"{named}.lora_a"], tensors[f"{named}.lora_b"]
        seen |= {f"{named}.lora_a", f"{named}.lora_b"}
        assert alpha / B.shape[1] == 1  # llama.cpp: scale = alpha / rank of this tensor
        assert A.shape[0] == B.shape[1] == 16
        UV = layer.low_rank_weight()
        heads = {"q_proj": 4, "k_proj": 2}.get(name.rpartition(".")[2])
        assert torch.allclose(B @ A, dealt_rows(UV, heads) if heads else UV, atol=1e-6), name
    assert seen == tensors.keys()


def test_rows_of_q_and_k_are_dealt_in_pairs():
    rows = torch.arange(16.0)[:, None]
    assert dealt_rows(rows, 2).flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]


def test_rotary_factors_are_those_of_transformers():
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 8192
    config = LlamaConfig(hidden_size=2048, num_attention_heads=32, rope_parameters=rope, max_position_embeddings=131072)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 5e5 ** (-torch.arange(0, 64, 2) / 64)
    assert torch.allclose(plain / rotary_factors(config.to_dict()), scaled, rtol=1e-5)


def test_what_gguf_or_llama_cpp_do_not_know_is_refused_by_name(tmp_path):
    write_result(tmp_path / "opt", "opt", tokenizer=byte_tokenizer())
    write_result(tmp_path / "letters")  # its tokenizer is one of this test suite
    write_result(tmp_path / "llama", tokenizer=byte_tokenizer())
    said = {"opt": "Models of the kind opt cannot be written as GGUF yet", "letters": "no name of llama.cpp is known"}
    for name, message in said.items():
        with pytest.raises(sparlow.InputError, match=message):
            sparlow.export(tmp_path / name, tmp_path / "out", form="gguf")
    for key, value, message in (
        ("hidden_act", "relu", "For llama, llama.cpp computes silu, and this model has relu"),
        (
            "rope_parameters",
            {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0},
            r"rotary embedding of this model \(yarn\)",
        ),
    ):
        edit(tmp_path / "llama" / CONFIG, lambda config, k=key, v=value: config.update({k: v}))
        with pytest.raises(sparlow.InputError, match=message):
            sparlow.export(tmp_path / "llama", tmp_path / "out", form="gguf")
        edit(tmp_path / "llama" / CONFIG, lambda config: config.update(hidden_act="silu"))
    assert not (tmp_path / "out").exists()


LOCAL, WHOLE = "sliding_attention", "full_attention"
ALTERNATING = ([LOCAL, WHOLE] * 4)[:7]
ROTATIONS = {LOCAL: {"rope_type": "default", "rope_theta": 1e4}, WHOLE: {"rope_type": "default", "rope_theta": 1e6}}
GEMMA = {
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "num_hidden_layers": 7,
    "sliding_window": 4,
    "rope_parameters": ROTATIONS,
}
OTHERS = {
    "another order": ("gemma3_text", GEMMA | {"layer_types": ALTERNATING}, "local attention in all layers but"),
    "another scale": ("gemma3_text", GEMMA | {"query_pre_attn_scalar": 9}, "scales queries by the head size alone"),
    "another base": (
        "gemma3_text",
        GEMMA | {"rope_parameters": ROTATIONS | {LOCAL: {"rope_type": "default", "rope_theta": 5e3}}},
        "rotates local layers by the base 10000 only",
    ),
    "scaled local layers": (
        "gemma3_text",
        GEMMA | {"rope_parameters": ROTATIONS | {LOCAL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4}}},
        "rotates local layers by the base 10000 only",
    ),
    "caps": ("gemma3_text", GEMMA | {"final_logit_softcapping": 30.0}, "neither soft caps nor attention to both sides"),
    "both sides": ("gemma3_text", GEMMA | {"use_bidirectional_attention": True}, "nor attention to both sides"),
    "no caps": ("gemma2", GEMMA | {"final_logit_softcapping": None}, "knows no model without soft caps"),
    "no biases": ("starcoder2", {"use_bias": False}, "knows no model without biases"),
    "half rotated": (
        "phi3",
        {"rope_parameters": ROTATIONS[LOCAL] | {"partial_rotary_factor": 0.5}},
        "not written as GGUF",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_model_that_llama_cpp_would_compute_otherwise_is_refused(case):
    kind, changes, message = OTHERS[case]
    config = transformers.AutoConfig.for_model(kind, **changes).to_dict()
    if case == "no caps":
        config["layer_types"] = ALTERNATING
    with pytest.raises(sparlow.InputError, match=message):
        settings(config, family_of(config))


def test_the_tokenizer_comes_along(tmp_path):
    _, reader, _ = written(tmp_path, "llama")
    tokenizer = byte_tokenizer()
    tokens = field(reader, "tokenizer.ggml.tokens")
    assert len(tokens) == 128
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens([*range(len(tokenizer))])
    kinds = field(reader, "tokenizer.ggml.token_type")
    assert (kinds[0], kinds[2], kinds[-1]) == (3, 1, 5)  # control, normal, unused
    assert field(reader, "tokenizer.ggml.model") == "gpt2"
    assert field(reader, "tokenizer.ggml.pre") == "gpt-2"
    assert field(reader, "tokenizer.ggml.merges")[:2] == ["Ġ t", "h e"]
    assert field(reader, "tokenizer.ggml.bos_token_id") == 0
    assert not field(reader, "tokenizer.ggml.add_bos_token")
    assert field(reader, "tokenizer.chat_template") == "{{ messages }}"


def test_pieces_have_scores_in_the_order_of_their_merges(tmp_path):
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"▁abc", "▁a", "▁ab"]
    merges = [("▁", "a"), ("▁a", "b")]
    model = models.BPE({t: i for i, t in enumerate(tokens)}, merges, unk_token="<unk>", byte_fallback=True)  # noqa: S106
    found = Tokenizer(model)
    found.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    found.add_special_tokens(["<s>", "</s>"])
    found.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"})
    )
    fields = tokenizer_fields(tmp_path, len(tokens))
    assert fields["ggml.model"] == "llama"
    assert fields["ggml.token_type"][:4] == [2, 3, 3, 6]
    scores = dict(zip(fields["ggml.tokens"], fields["ggml.scores"], strict=True))
    assert scores["▁a"] > scores["▁ab"] > scores["c"]
    assert fields["ggml.add_space_prefix"] is True
    with pytest.raises(sparlow.InputError, match="has 265 tokens, and the embedding 100 rows"):
        tokenizer_fields(tmp_path, 100)
    assert np.isfinite(fields["ggml.scores"]).all()
