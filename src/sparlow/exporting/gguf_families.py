"""The families of models that leave as GGUF: what llama.cpp calls them, and what it wants changed in their tensors.

Names of tensors are gguf's own map. What that does not say stands here: rows of q and k that are dealt in pairs for the
rotary embedding, norms that count from zero, and the settings of each family. A family is in the table once its logits
were compared; docs/elsewhere.md says with what.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparlow.errors import InputError

MERGE = "Export merged, and try llama.cpp's convert_hf_to_gguf.py on it."
Settings = Mapping[str, Any]  # config.json
_GELU = "gelu_pytorch_tanh"
_LOCAL_BASE = 10000.0  # of the rotary embedding in local layers, where llama.cpp has one of its own for them


@dataclass(frozen=True)
class Family:
    """What GGUF needs to know of a family.

    Attributes:
        arch: Its name in GGUF.
        activation: The only one that llama.cpp computes there.
        dealt: Whether rows of q and k are dealt in pairs.
        norms_from_zero: Whether weights of norms are stored as w − 1 by transformers.
        more: Further settings by their names below that of the architecture, from config.json.
    """

    arch: str
    activation: tuple[str, ...] = ("silu",)
    dealt: bool = False
    norms_from_zero: bool = False
    more: Callable[[Settings], dict[str, Any]] = lambda _: {}


def _no_window(config: Settings) -> dict[str, Any]:
    if config.get("use_sliding_window"):
        raise InputError(f"GGUF has no sliding window for {config['model_type']}. {MERGE}")
    return {}


def _window_is_context(config: Settings) -> dict[str, Any]:
    """llama.cpp attends to everything here, which is the same within a window."""
    window = config.get("sliding_window")
    return {"context_length": min(window, config["max_position_embeddings"])} if window else {}


def _local(config: Settings, every: int) -> dict[str, Any]:
    """Local attention in all layers but each ``every``-th, and queries that are scaled by the head size."""
    kind, count = config["model_type"], config["num_hidden_layers"]
    kinds = ([*["sliding_attention"] * (every - 1), "full_attention"] * count)[:count]
    if config.get("layer_types", kinds) != kinds:
        raise InputError(
            f"For {kind}, llama.cpp knows local attention in all layers but one of {every}, in this order only. {MERGE}"
        )
    if config.get("query_pre_attn_scalar", config["head_dim"]) != config["head_dim"]:
        raise InputError(f"For {kind}, llama.cpp scales queries by the head size alone. {MERGE}")
    return {"attention.sliding_window": config["sliding_window"]}


def _caps(config: Settings) -> dict[str, float]:
    return {name: config.get(name) or 0.0 for name in ("attn_logit_softcapping", "final_logit_softcapping")}


def _soft_caps(config: Settings) -> dict[str, Any]:
    local, caps = _local(config, 2), _caps(config)
    if 0.0 in caps.values():
        raise InputError(f"For {config['model_type']}, llama.cpp knows no model without soft caps. {MERGE}")
    return local | {name: float(cap) for name, cap in caps.items()}


def _two_rotations(config: Settings) -> dict[str, Any]:
    """Local layers have a rotary embedding of their own, which llama.cpp does not read from the file."""
    kind, found = config["model_type"], config["rope_parameters"].get("sliding_attention") or {}
    if found.get("rope_type", "default") != "default" or found.get("rope_theta") != _LOCAL_BASE:
        raise InputError(f"For {kind}, llama.cpp rotates local layers by the base {_LOCAL_BASE:.0f} only. {MERGE}")
    if any(_caps(config).values()) or config.get("use_bidirectional_attention"):
        raise InputError(f"For {kind}, llama.cpp knows neither soft caps nor attention to both sides. {MERGE}")
    return _local(config, 6)


def _with_biases(config: Settings) -> dict[str, Any]:
    if not config.get("use_bias", True):
        raise InputError(f"For {config['model_type']}, llama.cpp knows no model without biases. {MERGE}")
    return _window_is_context(config)


FAMILIES: Mapping[str, Family] = {  # by model_type of config.json
    "llama": Family("llama", dealt=True),
    "mistral": Family("llama", dealt=True, more=_window_is_context),
    "qwen2": Family("qwen2", more=_no_window),
    "qwen3": Family("qwen3", more=_no_window),
    "phi3": Family("phi3", more=_window_is_context),
    "starcoder2": Family("starcoder2", (_GELU,), more=_with_biases),
    "gemma2": Family("gemma2", (_GELU,), norms_from_zero=True, more=_soft_caps),
    "gemma3_text": Family("gemma3", (_GELU,), norms_from_zero=True, more=_two_rotations),
}


def family_of(config: Settings) -> Family:
    """Return the family of a model.

    Raises:
        InputError: It is none of the table, by its name.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise InputError(
            f"Models of the kind {kind} cannot be written as GGUF yet: only {', '.join(FAMILIES)}, whose results were "
            f"compared. {MERGE}"
        )
    found = FAMILIES[str(kind)]
    given = config.get("hidden_activation") or config.get("hidden_act")
    if given not in found.activation:
        raise InputError(f"For {kind}, llama.cpp computes {found.activation[0]}, and this model has {given}. {MERGE}")
    return found


def head_size(config: Settings) -> int:
    """Features of an attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def settings(config: Settings, family: Family) -> dict[str, Any]:
    """Return the settings of a model by their names below that of the architecture.

    Raises:
        InputError: The model has one that llama.cpp does not compute.
    """
    heads, size = config["num_attention_heads"], head_size(config)
    found = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config.get("num_key_value_heads") or heads,
        "attention.key_length": size,
        "attention.value_length": size,
        **_epsilon(config),
        "rope.dimension_count": size,
        "rope.freq_base": _base(config),
        "vocab_size": config["vocab_size"],
    }
    rope = _rope(config)
    if rope["rope_type"] == "linear":
        found |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    return found | family.more(config)


def _epsilon(config: Settings) -> dict[str, float]:
    if "rms_norm_eps" in config:
        return {"attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"])}
    return {"attention.layer_norm_epsilon": float(config["norm_epsilon"])}


def _rope(config: Settings) -> dict[str, Any]:
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    found = found.get("full_attention") or found  # one of each kind of attention: the family sees to the other
    kind = found.get("rope_type") or found.get("type") or "default"
    if kind not in ("default", "linear", "llama3") or float(found.get("partial_rotary_factor", 1.0)) != 1:
        raise InputError(f"The rotary embedding of this model ({kind}) is not written as GGUF yet. {MERGE}")
    return {**found, "rope_type": kind}


def _base(config: Settings) -> float:
    return float(_rope(config).get("rope_theta") or config.get("rope_theta") or 10000.0)


def rotary_factors(config: Settings) -> Tensor | None:
    """Return what llama.cpp divides each rotary frequency by (size / 2,), where the model scales them one by one."""
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    size = head_size(config)
    length = 2 * math.pi * _base(config) ** (torch.arange(0, size, 2, dtype=torch.float64) / size)  # of a wave
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    context = float(rope["original_max_position_embeddings"])
    smooth = ((context / length - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()


def dealt_rows(tensor: Tensor, heads: int) -> Tensor:
    """Return the rows of q or k, (out, …), in llama.cpp's order: the two halves of each head in turns."""
    return tensor.view(heads, 2, len(tensor) // heads // 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def heads_of(config: Settings, module: str) -> int | None:
    """Return the heads of a module whose rows are dealt: q and k; None of any other."""
    end = module.rpartition(".")[2]
    heads = {"q_proj": config["num_attention_heads"]}
    heads["k_proj"] = config.get("num_key_value_heads") or config["num_attention_heads"]
    return heads.get(end)
