"""Models that the caller holds: which of them can be taken, and how they are given back as they were."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from sparlow.errors import InputError
from sparlow.model.loading.source import parse_dtype


def require_usable(model: object) -> None:
    """Raise InputError unless this names a model, or is a plain one that is in memory as a whole."""
    if isinstance(model, str | Path):
        return
    if isinstance(model, nn.Module) and (adapter := _adapter_in(model)):
        raise InputError(
            f"The model holds an adapter ({adapter}), which would not be compressed with the weights that it changes. "
            "Merge it first (merge_and_unload of peft), or remove it."
        )
    if not isinstance(model, PreTrainedModel):
        raise InputError(
            f"A model is a hub id, a directory, a .gguf file or a model of transformers, not {type(model).__name__}."
        )
    away = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if away:
        raise InputError(
            f"The model's weights are not in memory ({away} is on the meta device, as with device_map or cpu_offload). "
            "Give the directory or hub id instead: it is read block by block."
        )


def require_as_it_is(model: PreTrainedModel, dtype: str, device: str) -> None:
    """Raise InputError if a model object is asked to be of another type, or elsewhere, than it is."""
    asked, here = parse_dtype(dtype), str(model.dtype).removeprefix("torch.")
    if asked not in ("auto", model.dtype):
        raise InputError(f"dtype {dtype} has no effect on a model object, which is {here}. Convert it first.")
    where = model.device
    if device != "auto" and torch.device(device) not in (where, torch.device(where.type)):
        raise InputError(f"device {device} has no effect on a model object, which is on {where}. Move it first.")


def _adapter_in(model: nn.Module) -> str | None:
    """What an adapter of peft in the model is called: the model's own wrapper, or the first layer that is wrapped."""
    if hasattr(model, "peft_config") and not isinstance(model, PreTrainedModel):
        return type(model).__name__
    wrapped = (name for name, m in model.named_modules() if isinstance(getattr(m, "base_layer", None), nn.Module))
    return next(wrapped, None)


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode inside of this context; afterwards every module is in the mode that it was in.

    What takes the place of a module meanwhile gets the mode of the whole model.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module in model.modules():
            module.training = modes.get(module, modes[model])
