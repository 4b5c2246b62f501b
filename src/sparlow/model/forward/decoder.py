"""The decoder blocks of a causal LM and the linear layers in them, found without knowing any architecture.

A decoder is a chain: embedding → block 0 → block 1 → … → norm and head. ``capture.capture_block_inputs`` learns how
each block is called, ``input_statistics.collect_statistics`` and ``run_block`` then need one block at a time.
"""

import copy
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparlow.errors import InputError, RunError
from sparlow.finite import all_finite
from sparlow.model.forward.activation_store import ActivationStore

_WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def decoder_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the qualified name and the list of the decoder's blocks.

    Raises:
        InputError: no ModuleList of the decoder, or more than one, is ``num_hidden_layers`` long.
    """
    depth = model.config.get_text_config().num_hidden_layers
    untyped: Any = model  # transformers does not annotate this method
    inside = set(untyped.get_decoder().modules())  # the towers of other modalities may be as deep
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        nested = any(name.startswith(f"{outer}.") for outer in found)  # e.g. two experts in each of two blocks
        if isinstance(module, nn.ModuleList) and module in inside and len(module) == depth and not nested:
            found[name] = module
    if len(found) != 1:
        names = f": {', '.join(found)}" if found else ""
        raise InputError(f"expected one list of {depth} decoder blocks, found {len(found)}{names}")
    return next(iter(found.items()))


def linears(block: nn.Module) -> dict[str, nn.Linear]:
    """Return a block's layers that compute ``x Wᵀ + b`` and nothing else, by name, in module order."""
    return {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear) and _is_plain(m)}


def _is_plain(linear: nn.Linear) -> bool:
    W = linear.weight
    if W.shape != (linear.out_features, linear.in_features) or W.dtype not in _WEIGHT_DTYPES:
        return False  # quantised or packed
    if type(linear).forward is nn.Linear.forward:
        return True
    # A subclass with its own forward (a router that also selects, grouped outputs, …) is asked with a small weight
    # of its own, so that the answer does not need the layer's weights, which may not be loaded.
    probe = copy.copy(linear)
    small = nn.Linear(3, 4, bias=linear.bias is not None)
    probe.__dict__["_parameters"] = {"weight": small.weight, "bias": small.bias}
    x = torch.linspace(-1, 1, 6).reshape(1, 2, 3)
    with torch.no_grad():
        try:
            y = type(linear).forward(probe, x)
        except Exception:  # noqa: BLE001 - a foreign forward may fail in any way, and then is not a plain linear
            return False
        return isinstance(y, Tensor) and y.shape == (1, 2, 4) and torch.allclose(y, small(x), atol=1e-6)


@dataclass(frozen=True)
class Skipped:
    """A module whose own parameters stay as they are."""

    name: str
    parameters: int
    why: str


def not_compressed(model: PreTrainedModel, compressed: Collection[str]) -> list[Skipped]:
    """List every module with parameters of its own outside the modules named in ``compressed``.

    Each parameter of the model, tied ones once, is in a compressed module or in exactly one row.
    """
    seen = {p for name in compressed for p in model.get_submodule(name).parameters()}
    rows = []
    for name, module in model.named_modules():
        own = set(module.parameters(recurse=False)) - seen
        if own:
            seen |= own
            rows.append(Skipped(name or "(the model itself)", sum(p.numel() for p in own), _why(model, module, own)))
    return rows


def output_head(model: PreTrainedModel) -> nn.Module | None:
    """Return the layer that gives the logits."""
    untyped: Any = model  # transformers does not annotate this method
    head: nn.Module | None = untyped.get_output_embeddings()
    return head


def _why(model: PreTrainedModel, module: nn.Module, own: Collection[nn.Parameter]) -> str:
    head = output_head(model)
    if module is head:
        return "output head"
    if isinstance(module, nn.Embedding):
        return "embedding and output head, tied" if head is not None and head.weight in own else "embedding"
    if isinstance(module, nn.Linear) and _is_plain(module):
        return "linear layer that was not selected"
    if all(p.ndim <= 1 for p in own):
        return "norm or bias"
    return f"weights of {type(module).__name__}, not a plain linear layer"


@dataclass(frozen=True)
class Call:
    """What a block is called with, after its hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def to(self, device: torch.device) -> "Call":
        """Return the call with its tensors on ``device``."""
        return Call(_moved(self.args, device), _moved(self.kwargs, device))

    def named(self) -> dict[str, Any]:
        """Return positional and keyword arguments in one, for messages."""
        return {f"argument {i}": value for i, value in enumerate(self.args, 2)} | self.kwargs


def _moved(value: Any, device: torch.device) -> Any:  # noqa: ANN401 - arguments of a foreign forward
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(_moved(v, device) for v in value)
    if type(value) is dict:
        return {k: _moved(v, device) for k, v in value.items()}
    return value


def tensors_in(value: Any) -> Iterator[Tensor]:  # noqa: ANN401 - arguments of a foreign forward
    """Yield the tensors in an argument, those in tuples, lists and dicts included."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list | dict):
        for v in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(v)


def run_block(block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    """Return the block's hidden state (b, seqlen, d), on the block's device; gradients flow.

    Args:
        hidden: (b, seqlen, d), on any device.
        call: what ``capture_block_inputs`` noted for this block and b windows.
    """
    device = next(block.parameters()).device
    call = call.to(device)
    return hidden_state(block(hidden.to(device), *call.args, **call.kwargs))


def pass_through(
    block: nn.Module, hidden: ActivationStore, calls: Mapping[int, Call], *, label: str | None = None
) -> ActivationStore:
    """Return what a block makes of all hidden states (b, seqlen, d), kept where they were.

    Args:
        block: Any of the chain.
        hidden: Its inputs.
        calls: How it is called, by number of windows.
        label: How an error calls the block; without one nothing is checked.

    Raises:
        RunError: An output is not finite.
    """
    outputs = hidden.fresh()
    for x in hidden:
        y = run_block(block, x, calls[len(x)]) if len(x) else x
        if label is not None and not all_finite(y):
            raise RunError(f"{label}: the block's output is not finite: raise the damping, or use --dtype float32.")
        outputs.append(y)
    return outputs


def hidden_state(output: Any) -> Tensor:  # noqa: ANN401 - what a foreign forward returns
    """Return the hidden state in what a block returned."""
    state: Tensor = output[0] if isinstance(output, tuple | list) else output
    return state
