"""The decoder blocks of a causal LM, found without knowing any architecture, and what is not compressed in it.

A decoder is a chain: embedding → block 0 → block 1 → … → norm and head. ``capture.capture_block_inputs`` learns how
each block is called; ``block_pass`` and ``input_statistics`` then need one block at a time.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from sparlow.errors import InputError
from sparlow.model.forward.compressible import CompressibleWeight, compressible, weight_of


@dataclass(frozen=True)
class Decoder:
    """The chain of blocks in a model.

    Attributes:
        name: Of the list of blocks in the model.
        blocks: In order; a model whose weights stay on disk puts each here while it has its weights.
    """

    name: str
    blocks: nn.ModuleList

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Decoder":
        """Find the decoder's blocks.

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
        return cls(*next(iter(found.items())))

    def __len__(self) -> int:
        return len(self.blocks)

    def label(self, i: int) -> str:
        """Return the name of block i in the model."""
        return f"{self.name}.{i}"

    def layer_name(self, i: int, name: str) -> str:
        """Return the name in the model of what is called ``name`` within block i."""
        return f"{self.label(i)}.{name}"

    def weights(self, i: int) -> dict[str, CompressibleWeight]:
        """Return what can be compressed in block i as it is now, by the name within it."""
        return compressible(self.blocks[i])

    def layers(self) -> Iterator[tuple[str, CompressibleWeight]]:
        """Yield what can be compressed in all blocks, by the name in the model."""
        for i in range(len(self)):
            yield from ((self.layer_name(i, name), weight) for name, weight in self.weights(i).items())

    def holds(self, name: str) -> bool:
        """Whether what has this name in the model is in one of the blocks."""
        return name.startswith(f"{self.name}.")


def shared_weights(model: PreTrainedModel, decoder: Decoder) -> list[str]:
    """Return the names of weights of blocks that have another name too, sorted.

    Some are tied by the class's own account, others because one module stands in several places, which only the
    parameters themselves show.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    groups = [*model.all_tied_weights_keys.items(), *(group for group in names.values() if len(group) > 1)]
    return sorted({name for group in groups for name in group if decoder.holds(name)})


def require_own_weights(model: PreTrainedModel, decoder: Decoder) -> None:
    """Raise InputError if a block shares a weight with another layer: it could not be written block by block."""
    for name in shared_weights(model, decoder)[:1]:
        raise InputError(f"{name} is shared with another layer, so it cannot be compressed block by block")


@dataclass(frozen=True)
class Skipped:
    """A module whose own parameters stay as they are."""

    name: str
    parameters: int
    why: str


def not_compressed(model: PreTrainedModel, compressed: Collection[str]) -> list[Skipped]:
    """List every module with parameters of its own outside the layers named in ``compressed``.

    Each parameter of the model, tied ones once, is in a compressed layer or in exactly one row.
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
    if weight_of(model, "", module) is not None:
        return "linear layer that was not selected"
    if all(p.ndim <= 1 for p in own):
        return "norm or bias"
    return f"weights of {type(module).__name__}, not a plain linear layer"
