"""Between compressed layers and PEFT: S as a plain frozen linear layer, U V as the LoRA adapter on it.

PEFT computes W x + (alpha / r) B A x. With W = S, B = U, A = V and alpha = r the scale is exactly 1, whatever the ranks
of the layers, so nothing is rounded on the way there or back: the function is the compressed layer's. The paper's alpha
of 16 would store B = U · r / 16 for the same function. Adam's steps do not depend on the scale of a gradient, so all it
changes, but for clipping, is that the learning rate of U is 16 / r times that of V; at rank 16 the two agree.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparlow.errors import RunError
from sparlow.model.artefact.layers import SparseLowRankLinear, compressed_layers
from sparlow.model.artefact.stored_form import StoredForm, Weight, pack_weight

if TYPE_CHECKING:
    from peft import PeftModel

_ADAPTER = "default"  # PEFT's name of the only adapter
_FORM = "form_of_sparse_part"  # attribute of a plain layer: how the compressed one was packed


class LowRank(NamedTuple):
    """The low-rank part of a layer: U (out, rank) and V (rank, in)."""

    U: Tensor
    V: Tensor


def take_apart(model: PreTrainedModel) -> dict[str, LowRank]:
    """Put a plain linear layer with S and the bias in the place of every compressed one, sharing their memory.

    Returns:
        U and V by the layer's name, rank 0 included.
    """
    parts = {}
    for name, layer in compressed_layers(model).items():
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        linear.weight, linear.bias = layer.S, layer.bias  # type: ignore[assignment]  # None where there is no bias
        vars(linear)[_FORM] = layer.stored
        model.set_submodule(name, linear.train(layer.training))
        parts[name] = LowRank(layer.U.detach(), layer.V.detach())
    return parts


def put_together(model: PreTrainedModel, parts: Mapping[str, LowRank]) -> None:
    """Put compressed layers of S, U and V in the place of plain ones: undoes ``take_apart``, with these U and V.

    S is packed as it was. U and V are too, unless they were trained: then they are stored in the model's own type.
    """
    for name, (U, V) in parts.items():
        linear: Any = model.get_submodule(name)
        S = linear.weight.detach()
        layer = SparseLowRankLinear(S, U.to(S), V.to(S), linear.bias)
        layer.stored = _form_left(layer, vars(linear).get(_FORM))
        model.set_submodule(name, layer.train(linear.training))


def _form_left(layer: SparseLowRankLinear, form: StoredForm | None) -> StoredForm | None:
    """Return a form without what the factors of a layer do not fit any more."""
    if form is None or form.factors is None:
        return form
    lost = pack_weight(Weight(layer.S, layer.U, layer.V), form).lost
    return replace(form, factors=None) if "factors" in lost else form


def with_lora(model: PreTrainedModel, parts: Mapping[str, LowRank], ranks: Mapping[str, int], seed: int) -> "PeftModel":
    """Wrap a model that was taken apart, in place; only the adapters can be trained.

    Args:
        model: Its layers in ``ranks`` are plain linear ones.
        parts: What the adapters start from, by name. A layer that is not here starts from PEFT's random A and zero B.
        ranks: The rank of the adapter by the layer's name; other layers have none.
        seed: Of the random starts.

    Raises:
        RunError: PEFT did not give exactly these layers an adapter of this rank and scale 1.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    common = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: rank for name, rank in ranks.items() if rank != common}
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=common,
        lora_alpha=common,
        lora_dropout=0.0,
        target_modules=list(ranks),
        rank_pattern=others,
        alpha_pattern=dict(others),
    )
    with torch.random.fork_rng(devices=[]):  # PEFT draws on the CPU
        torch.manual_seed(seed)
        wrapped: PeftModel = get_peft_model(model, config)
    layers = _lora_layers(wrapped)
    if {name: layer.r[_ADAPTER] for name, layer in layers.items()} != dict(ranks):
        raise RunError(
            "PEFT did not take the layers or the ranks that it was given, because the names of layers are ambiguous."
        )
    for name, layer in layers.items():
        if layer.scaling[_ADAPTER] != 1:
            raise RunError(f"PEFT scales the adapter of {name} by {layer.scaling[_ADAPTER]} instead of 1.")
        if name in parts:
            _set(layer.lora_B[_ADAPTER], parts[name].U)
            _set(layer.lora_A[_ADAPTER], parts[name].V)
    return wrapped


def unwrap(wrapped: "PeftModel", dtype: torch.dtype) -> tuple[PreTrainedModel, dict[str, LowRank]]:
    """Return the plain model without its adapters, and these as U and V, rounded to ``dtype``."""
    found = {
        name: LowRank(
            layer.lora_B[_ADAPTER].weight.detach().to(dtype).clone(),
            layer.lora_A[_ADAPTER].weight.detach().to(dtype).clone(),
        )
        for name, layer in _lora_layers(wrapped).items()
    }
    untyped: Any = wrapped
    model: PreTrainedModel = untyped.unload()
    return model, found


def _set(part: nn.Linear, value: Tensor) -> None:
    with torch.no_grad():
        part.weight.copy_(value)


def _lora_layers(wrapped: "PeftModel") -> dict[str, Any]:
    """Return PEFT's layers by the name that the layer had before it was wrapped."""
    from peft.tuners.lora import LoraLayer

    untyped: Any = wrapped
    return {name: m for name, m in untyped.get_base_model().named_modules() if isinstance(m, LoraLayer)}
