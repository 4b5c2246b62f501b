"""Tiny random models of many families, and a tokenizer that fits them all."""

import copy
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from sparlow.model.forward.compressible import ExpertWeight, compressible

VOCABULARY = 128
WINDOW = 8  # of sliding attention, shorter than the sequences of the tests

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW, "num_hidden_layers": 4}
_FALCON = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {  # name: model type of transformers, what differs from _SIZES
    "llama": ("llama", {}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": 1}),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "gemma2": ("gemma2", _GEMMA),
    "gemma3_text": ("gemma3_text", _GEMMA | {"layer_types": ["sliding_attention", "full_attention"] * 2}),
    "phi3": ("phi3", {"sliding_window": WINDOW}),
    "gpt_neox": ("gpt_neox", {}),
    "falcon": ("falcon", _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False}),
    "falcon_alibi": (
        "falcon",
        _FALCON | {"new_decoder_architecture": False, "multi_query": True, "alibi": True, "parallel_attn": True},
    ),
    "bloom": ("bloom", {"n_head": 4, "n_layer": 3}),
    "olmo2": ("olmo2", {}),
    "granite": ("granite", {"attention_multiplier": 0.35, "residual_multiplier": 0.5}),
    "stablelm": ("stablelm", {}),
    "starcoder2": ("starcoder2", {"sliding_window": WINDOW}),
}
_EXTRAS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"n_inner": 48}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
_WHOLE: dict[str, tuple[str, dict[str, Any]]] = {  # with as many blocks as their kinds of attention take to come round
    "gemma3": ("gemma3_text", _GEMMA | {"num_hidden_layers": 7}),
}
_LAYERS = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2}
_PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY}
_MAMBA = {"use_mamba_kernels": False, "mamba_d_state": 4, "num_hidden_layers": 4, "pad_token_id": 1}
_HYBRID = ["mamba", "hybrid", "mamba", "hybrid"]
_BY_TEXT: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma4_text": ("gemma4_text", _GEMMA | _LAYERS | _PER_LAYER | {"global_head_dim": 8, "tie_word_embeddings": True}),
    "gemma3n_text": ("gemma3n_text", _GEMMA | _LAYERS | _PER_LAYER | {"laurel_rank": 4, "altup_num_inputs": 4}),
    "zamba": ("zamba", _MAMBA | {"n_mamba_heads": 2, "layers_block_type": _HYBRID, "num_key_value_heads": 4}),
    "zamba2": ("zamba2", _MAMBA | {"n_mamba_heads": 4, "layers_block_type": _HYBRID, "num_key_value_heads": 4}),
}

_MOE = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
_DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_SSM = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
_STRUCTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon_h1": (
        "falcon_h1",
        _SSM | {"head_dim": 8, "mamba_chunk_size": 16, "ssm_multipliers": [0.5, 2.0, 0.7, 1.3, 0.9]},
    ),
    "gemma4_moe": (
        "gemma4_text",
        _GEMMA
        | _MOE
        | {"layer_types": ["sliding_attention", "full_attention"] * 2, "enable_moe_block": True, "top_k_experts": 2}
        | {"hidden_size_per_layer_input": 0, "global_head_dim": 8, "num_experts": 12, "tie_word_embeddings": True},
    ),
    "afmoe": (
        "afmoe",
        _MOE | {"num_experts": 12, "head_dim": 8, "num_dense_layers": 1, "sliding_window": WINDOW},
    ),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", {"num_experts": 12, "moe_topk": 2, "head_dim": 8}),
    "jetmoe": ("jetmoe", {"num_local_experts": 12, "num_experts_per_tok": 2, "kv_channels": 8}),
    "dbrx": (
        "dbrx",
        {"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 64}
        | {"ffn_config": {"hidden_size": 32, "ffn_hidden_size": 24, "moe_num_experts": 12, "moe_top_k": 2}}
        | {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    ),
    "qwen2_moe": ("qwen2_moe", _MOE | {"shared_expert_intermediate_size": 24}),
    "qwen3_next": (
        "qwen3_next",
        _MOE | _DELTA | {"shared_expert_intermediate_size": 24, "head_dim": 8, "num_hidden_layers": 4},
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {"moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
        | {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
        | {"first_k_dense_replace": 1, "num_key_value_heads": 4},
    ),
    "gpt_oss": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": WINDOW}),
    "mamba": ("mamba", {"state_size": 4, "time_step_rank": 12}),
    "mamba2": ("mamba2", {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16}),
    "jamba": (
        "jamba",
        {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2}
        | {"num_experts": 4, "num_experts_per_tok": 2, "use_mamba_kernels": False, "mamba_d_state": 4},
    ),
    "rwkv": ("rwkv", {"attention_hidden_size": 32}),
}

FAMILIES = tuple(_MODELS)
STRUCTURES = tuple(_STRUCTURES)  # experts, state spaces, linear attention: blocks that are not all attention and an MLP
BY_TEXT = tuple(_BY_TEXT)  # blocks are given what depends on the text, or what earlier blocks wrote
EXTRAS = tuple(_EXTRAS)  # models of which some or all layers are no nn.Linear


def tiny(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, blocks: int | None = None) -> PreTrainedModel:
    """A random model of a family in eval mode: 3 or 4 blocks, or so many, 32 features, 128 tokens."""
    return copy.deepcopy(_made(name, dtype, seed, blocks))


@functools.cache  # hundreds of tests ask for the same few, and a copy takes a small part of the time
def _made(name: str, dtype: torch.dtype, seed: int, blocks: int | None) -> PreTrainedModel:
    model_type, changes = (_MODELS | _EXTRAS | _WHOLE | _BY_TEXT | _STRUCTURES)[name]
    fewer = {} if blocks is None else {"num_hidden_layers": blocks}
    config = AutoConfig.for_model(model_type, **(_SIZES | changes | fewer))
    auto: Any = AutoModelForCausalLM
    with torch.random.fork_rng():  # transformers draws weights of its own first
        model = auto.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            # norms near one, everything else large enough for every block to change what passes through it
            p.normal_(1.0 if p.ndim == 1 and bool((p == 1).all()) else 0.0, 0.2, generator=generator)
    result: PreTrainedModel = model.to(dtype).eval()
    return result


def linears(block: nn.Module) -> dict[str, nn.Module]:
    """The modules of a block that can be compressed, by name; experts in one parameter have none before they are."""
    weights = {name: weight for name, weight in compressible(block).items() if not isinstance(weight, ExpertWeight)}
    return {name: block.get_submodule(weight.reads) for name, weight in weights.items()}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Two special tokens, then one token for each printable ASCII character; any other character is lost."""
    characters = ["\n", *map(chr, range(32, 127))]
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *characters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    untyped: Any = PreTrainedTokenizerFast
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    result: PreTrainedTokenizerFast = untyped(tokenizer_object=tokenizer, **special)
    return result


def save_tiny(name: str, folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """Write a tiny model and its tokenizer as an ordinary directory of transformers; return the model."""
    written, model = _written(name, dtype, seed)
    shutil.copytree(Path(written.name) / "model", folder, copy_function=shutil.copy, dirs_exist_ok=True)
    return copy.deepcopy(model)


@functools.cache  # as the models
def _written(name: str, dtype: torch.dtype, seed: int) -> tuple[tempfile.TemporaryDirectory[str], PreTrainedModel]:
    folder, model = tempfile.TemporaryDirectory(prefix="tiny-"), tiny(name, dtype=dtype, seed=seed)
    model.save_pretrained(Path(folder.name) / "model")
    tiny_tokenizer().save_pretrained(Path(folder.name) / "model")
    return folder, model
