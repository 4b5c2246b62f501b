"""Compressed experts in other forms: one tensor of all of them again, or a refusal."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparlow.errors import InputError
from sparlow.exporting.stored import Stored
from sparlow.model.forward.compressible import ExpertWeight, expert_of


def fused(model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors with those of experts put together as the model's class has them.

    Args:
        model: The dense model, which may be without weights.
        state: Some of its tensors by name; of a parameter that holds experts all of these, or none.
    """
    found: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        layer, _, last = name.rpartition(".")
        expert = expert_of(model, layer) if last == "weight" else None
        if expert is None:
            found[name] = tensor
        else:
            parts.setdefault(expert.fused, {})[expert.number] = tensor
    for name, experts in parts.items():
        whole = model.get_parameter(name)
        found[name] = torch.stack([experts[number] for number in sorted(experts)]).view(whole.shape)
    return found


def require_no_experts(stored: Stored, model: PreTrainedModel, form: str, instead: str = "Export merged.") -> None:
    """Raise InputError if the directory has compressed experts, for which a form has no place.

    Args:
        stored: The directory.
        model: Its model, which may be without weights.
        form: For the error.
        instead: What else can be done.
    """
    expert: ExpertWeight | None = next(filter(None, (expert_of(model, name) for name in stored.layers)), None)
    if expert is not None:
        raise InputError(
            f"{expert.fused} holds the weights of {expert.layout.experts} experts in one tensor, which {form} has no "
            f"compressed form of. {instead}"
        )
