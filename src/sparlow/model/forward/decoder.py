"""The decoder blocks of a causal LM, found without knowing any architecture, and what is not compressed in it.

A decoder is a chain: embedding → block 0 → block 1 → … → norm and head. ``capture.capture_block_inputs`` finds out how
each block is called. After that, ``block_pass`` and ``input_statistics`` need only one block at a time.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from sparlow.errors import InputError
from sparlow.model.forward.compressible import CompressibleWeight, compressible, expert_of, weight_of
from sparlow.model.forward.fused_layout import layouts

NO_REASONS: Mapping[str, str] = {}


@dataclass(frozen=True)
class Decoder:
    """The chain of blocks in a model.

    Attributes:
        name: The name of the list of blocks in the model.
        blocks: The blocks in order. If the weights stay on disk, a block with weights stands here while it is used.
    """

    name: str
    blocks: nn.ModuleList

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Decoder":
        """Find the decoder's blocks.

        Raises:
            InputError: No ModuleList of the decoder, or more than one, is as long as its config says, if it does.
        """
        depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
        if depth is None:
            raise InputError(
                "The model's config has no num_hidden_layers, so its blocks are unknown. Give another model."
            )
        untyped: Any = model  # transformers does not annotate this method
        inside = set(untyped.get_decoder().modules())  # the towers of other modalities may be as deep
        found: dict[str, nn.ModuleList] = {}
        for name, module in model.named_modules():
            nested = any(name.startswith(f"{outer}.") for outer in found)  # e.g. two experts in each of two blocks
            if isinstance(module, nn.ModuleList) and module in inside and len(module) == depth and not nested:
                found[name] = module
        if len(found) != 1:
            names = f": {', '.join(found)}" if found else ""
            raise InputError(f"The model must have one list of {depth} decoder blocks, but has {len(found)}{names}.")
        return cls(*next(iter(found.items())))

    def __len__(self) -> int:
        return len(self.blocks)

    def label(self, i: int) -> str:
        """Return the name of block i in the model."""
        return f"{self.name}.{i}"

    def layer_name(self, i: int, name: str) -> str:
        """Return the full name of the layer that is called ``name`` within block i."""
        return f"{self.label(i)}.{name}"

    def weights(self, i: int) -> dict[str, CompressibleWeight]:
        """Return the weights of block i that can be compressed, by name within the block."""
        return compressible(self.blocks[i])

    def layers(self) -> Iterator[tuple[str, CompressibleWeight]]:
        """Yield the weights of all blocks that can be compressed, with their full names."""
        for i in range(len(self)):
            yield from ((self.layer_name(i, name), weight) for name, weight in self.weights(i).items())

    def holds(self, name: str) -> bool:
        """Whether a module or tensor of this full name is inside one of the blocks."""
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
    """Raise InputError if a weight of a block is tied to another layer, so that blocks cannot be written one by one."""
    for name in shared_weights(model, decoder)[:1]:
        raise InputError(f"{name} is shared with another layer, so it cannot be compressed block by block.")


@dataclass(frozen=True)
class Skipped:
    """A module whose own parameters are not compressed: they stay as they are, unless ``trained``."""

    name: str
    parameters: int
    why: str
    trained: bool = False


def not_compressed(
    model: PreTrainedModel,
    compressed: Collection[str],
    reasons: Mapping[str, str] = NO_REASONS,
    trained_in: Decoder | None = None,
) -> list[Skipped]:
    """List every module with parameters of its own outside the layers named in ``compressed``.

    Each parameter of the model is in a compressed layer or in exactly one row; tied parameters count once.

    Args:
        model: All of it.
        compressed: Names of layers.
        reasons: Why a layer stays dense, where more is known of it than what it is.
        trained_in: The decoder whose blocks were trained; their norms are marked.
    """
    seen, experts = _parameters_of(model, compressed)
    rows = []
    for name, module in model.named_modules():
        own = set(module.parameters(recurse=False)) - seen
        if own:
            seen |= own
            why = reasons.get(name) or _why(model, name, module, own)
            trained = trained_in is not None and trained_in.holds(name) and is_norm(module)
            count = sum(p.numel() - experts.get(p, 0) for p in own)
            rows.append(Skipped(name or "(the model itself)", count, why, trained))
    return rows


def _parameters_of(model: PreTrainedModel, names: Collection[str]) -> tuple[set[nn.Parameter], dict[nn.Parameter, int]]:
    """Return the parameters of layers, and of those that hold further experts how many entries belong to the layers."""
    whole: set[nn.Parameter] = set()
    parts: dict[nn.Parameter, int] = {}
    modules = dict(model.named_modules())
    for name in names:
        if name in modules:
            whole |= set(modules[name].parameters())
        elif expert := expert_of(model, name):
            (parameter,) = expert.parameters()
            parts[parameter] = parts.get(parameter, 0) + parameter.numel() // expert.layout.experts
    return whole | {p for p, count in parts.items() if count == p.numel()}, parts


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm, or adds a bias: what training a block trains beside the compressed layers.

    Its weight and its bias, vectors both, are all that it has. A vector of another meaning, such as the decay of a
    state space, the sinks of an attention or the shape of an activation, has another name, or stands beside parts that
    compute.
    """
    own = dict(module.named_parameters())
    return bool(own) and own.keys() <= {"weight", "bias"} and all(p.ndim <= 1 for p in own.values())


def output_head(model: PreTrainedModel) -> nn.Module | None:
    """Return the layer that gives the logits."""
    untyped: Any = model  # transformers does not annotate this method
    head: nn.Module | None = untyped.get_output_embeddings()
    return head


def _why(model: PreTrainedModel, name: str, module: nn.Module, own: Collection[nn.Parameter]) -> str:
    head = output_head(model)
    if module is head:
        return "output head"
    if isinstance(module, nn.Embedding):
        return "embedding and output head, tied" if head is not None and head.weight in own else "embedding"
    if weight_of(model, "", module) is not None:
        return "linear layer that was not selected"
    if any(module.get_parameter(part) in own for part in layouts(model, name, module)):
        return "experts that were not selected"
    if is_norm(module):
        return "norm or bias"
    kind = "vectors" if all(p.ndim <= 1 for p in own) else "weights"
    return f"{kind} of {type(module).__name__}, not a plain linear layer"
