"""What a run has to do, in numbers: layers and their budgets, sizes of the model, tokens. From shapes alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import PreTrainedModel

from sparlow.evaluation.perplexity import require_context
from sparlow.machine import check_device
from sparlow.model._transformers import NO_STREAMING
from sparlow.model.artefact.dtypes import StoredDtypes
from sparlow.model.forward.activation_store import place
from sparlow.model.forward.decoder import Decoder, require_own_weights
from sparlow.model.forward.stand_ins import require_chain
from sparlow.model.loading.meta import shared_inputs
from sparlow.model.training.loop import Plan as Matching
from sparlow.recipe.allocation import Budget, Shape
from sparlow.recipe.budgets import budgets
from sparlow.recipe.recipe import Recipe
from sparlow.recipe.training_plan import micro_batch, plan_of
from sparlow.text import expected_windows


@dataclass(frozen=True)
class Layer:
    """One layer of a block that can be compressed.

    Attributes:
        name: Within the block.
        shape: (out, in).
        owner: The first layer of the block that reads the same input; they share a Gram matrix.
        bias: Whether it has one.
        budget: What it may keep; None if it stays dense.
    """

    name: str
    shape: Shape
    owner: str
    bias: bool
    budget: Budget | None

    @property
    def weights(self) -> int:
        """Entries of W."""
        return self.shape[0] * self.shape[1]

    @property
    def parameters(self) -> int:
        """Entries of W and of the bias."""
        return self.weights + self.shape[0] * self.bias

    @property
    def low_rank(self) -> int:
        """Numbers in U and V."""
        return self.budget.rank * sum(self.shape) if self.budget else 0

    @property
    def trained(self) -> int:
        """Numbers that are kept and can be trained: of S, U, V and the bias."""
        return self.budget.values(self.shape) + self.shape[0] * self.bias if self.budget else self.parameters

    def kept_bytes(self, size: int) -> int:
        """Bytes as stored, numbers of ``size`` bytes each: what ``Storage.packed_bytes`` will find."""
        if self.budget is None:
            return self.parameters * size
        rows, columns = self.shape
        mask = 0 if self.budget.pattern.kept(self.shape) == self.weights else rows * ((columns + 7) // 8)
        return self.trained * size + mask


@dataclass(frozen=True)
class Block:
    """One decoder block.

    Attributes:
        layers: What can be compressed in it, in module order.
        parameters: All of them, those of other modules included.
    """

    layers: tuple[Layer, ...]
    parameters: int

    @property
    def compressed(self) -> list[Layer]:
        """Those that do not stay dense."""
        return [layer for layer in self.layers if layer.budget]

    @property
    def low_rank(self) -> int:
        """Numbers in U and V of all layers."""
        return sum(layer.low_rank for layer in self.layers)

    @property
    def inputs(self) -> dict[str, int]:
        """Features of each distinct input, by its owner."""
        return {layer.owner: layer.shape[1] for layer in self.layers}

    @property
    def trained(self) -> int:
        """Numbers that matching trains."""
        return self.parameters - sum(layer.parameters - layer.trained for layer in self.layers)

    def kept_bytes(self, size: int) -> int:
        """Bytes of the block's shard, without its header."""
        dense = self.parameters - sum(layer.parameters for layer in self.layers)
        return dense * size + sum(layer.kept_bytes(size) for layer in self.layers)


@dataclass(frozen=True)
class Workload:
    """One run.

    Attributes:
        name: Of the list of blocks in the model.
        blocks: In order.
        outside: Parameters outside of the blocks, tied ones once.
        largest: Entries of the largest tensor.
        features: Of a hidden state.
        vocabulary: Tokens that have logits.
        stored_in: Type of the weights in files.
        computed_in: Type that blocks compute in.
        recipe: What is done.
        evaluation: Windows by corpus on which perplexity is measured.
        evaluate_seqlen: Tokens in each.
        device: Where blocks run.
        offload: Where hidden states wait, as asked for.
        streamed: The weights stay on disk, and one part at a time is read.
        there: The whole model is in memory already.
        processes: Those that divide the calibration windows.
        carried: Numbers of a token in a copy of the hidden states, if more than features. What else the text decides of
            the blocks' arguments is there once; it is counted here with half, as there are two copies at least.
    """

    name: str
    blocks: tuple[Block, ...]
    outside: int
    largest: int
    features: int
    vocabulary: int
    stored_in: torch.dtype
    computed_in: torch.dtype
    recipe: Recipe
    evaluation: Mapping[str, int]
    evaluate_seqlen: int
    device: torch.device
    offload: str = "auto"
    streamed: bool = True
    there: bool = False
    processes: int = 1
    carried: int = 0

    @property
    def stored(self) -> int:
        """Bytes of a number in files."""
        return self.stored_in.itemsize

    @property
    def computing(self) -> int:
        """Bytes of a number that is computed with."""
        return self.computed_in.itemsize

    @property
    def kinds(self) -> list[tuple[Shape, Budget]]:
        """Shape and budget of every layer that is compressed."""
        return [(layer.shape, layer.budget) for block in self.blocks for layer in block.layers if layer.budget]

    @property
    def parameters(self) -> int:
        """Of the whole model, tied ones once."""
        return self.outside + sum(block.parameters for block in self.blocks)

    @property
    def tokens(self) -> int:
        """Of the calibration text."""
        return self.recipe.samples * self.recipe.seqlen

    @property
    def hidden(self) -> int:
        """Bytes of one copy of the hidden states of the calibration text, those of one process."""
        windows = -(-self.recipe.samples // self.processes)
        return windows * self.recipe.seqlen * max(self.carried, self.features) * self.computing

    @property
    def evaluated(self) -> int:
        """Tokens of the longest text on which perplexity is measured."""
        return max(self.evaluation.values(), default=0) * self.evaluate_seqlen

    @property
    def by_block(self) -> Matching | None:
        """How every block is trained by itself, if it is."""
        plan = plan_of(self.recipe)
        return None if plan is None or plan.together else plan

    @property
    def together(self) -> Matching | None:
        """How all blocks are trained together, if they are."""
        plan = plan_of(self.recipe)
        return plan if plan and plan.together else None

    @property
    def batch(self) -> int:
        """Tokens of the calibration text that pass through a block at a time."""
        return min(micro_batch(self.recipe, self.recipe.seqlen), self.recipe.samples) * self.recipe.seqlen

    @cached_property
    def place(self) -> torch.device | str:
        """Where hidden states of the calibration text wait."""
        return place(self.offload, self.hidden, self.device)

    @property
    def kept_bytes(self) -> int:
        """Of the whole result, without the shards' headers."""
        return self.outside * self.stored + sum(block.kept_bytes(self.stored) for block in self.blocks)


def workload(
    model: PreTrainedModel,
    recipe: Recipe,
    *,
    device: str,
    offload: str = "auto",
    evaluate: Sequence[str] = (),
    evaluate_seqlen: int | None = None,
    limit: int | None = None,
    streamed: bool = True,
    processes: int = 1,
) -> Workload:
    """Look at the shapes of a model, which may be a meta model.

    Args:
        model: A meta model, else the model itself, which stays where it is.
        recipe: What is done.
        device: Where blocks run, as torch names it.
        offload: Where hidden states wait: auto, cpu or disk.
        evaluate: Corpora or files on which perplexity is measured.
        evaluate_seqlen: Tokens in a window of these; the recipe's seqlen if left out.
        limit: At most so many windows of each.
        streamed: The result is written block by block, and the weights of a meta model are read part by part.
        processes: Those that divide the calibration windows.

    Raises:
        InputError: A layer does not fit the recipe, the blocks cannot be replayed or written one by one, a text does
            not exist, or the device cannot be used.
    """
    check_device(device)
    there = not next(model.parameters()).is_meta
    where = model.device if there else torch.device(device)
    decoder = Decoder.of(model)
    found = _blocks(model, decoder, budgets(decoder, recipe))
    brought = None if there else require_chain(model)
    require_own_weights(model, decoder)
    stored = StoredDtypes.of(model).dtype
    half = where.type == "cpu" and not there and stored in (torch.float16, torch.bfloat16)  # see source.upcast_for_cpu
    config = model.config.get_text_config()
    seqlen = max(evaluate_seqlen or recipe.seqlen, 2)
    for tokens in (recipe.seqlen, seqlen if evaluate else recipe.seqlen):
        require_context(model, tokens)
    return Workload(
        name=decoder.name,
        blocks=found,
        outside=sum(p.numel() for p in model.parameters()) - sum(block.parameters for block in found),
        largest=max(p.numel() for p in model.parameters()),
        features=config.hidden_size,
        vocabulary=config.vocab_size,
        stored_in=stored,
        computed_in=torch.float32 if half else stored,
        recipe=recipe,
        evaluation={e: expected_windows(e, config.vocab_size, seqlen=seqlen, limit=limit) for e in evaluate},
        evaluate_seqlen=seqlen,
        device=where,
        offload=offload,
        streamed=streamed and not there and not NO_STREAMING,
        there=there,
        processes=processes,
        carried=brought.hidden + -(-brought.beside // 2) if brought else 0,
    )


def _blocks(model: PreTrainedModel, decoder: Decoder, kept: Mapping[str, Budget]) -> tuple[Block, ...]:
    found = []
    for i, owners in enumerate(shared_inputs(model)):
        layers = (
            Layer(name, weight.shape, owners[name], weight.bias is not None, kept.get(decoder.layer_name(i, name)))
            for name, weight in decoder.weights(i).items()
        )
        found.append(Block(tuple(layers), sum(p.numel() for p in decoder.blocks[i].parameters())))
    return tuple(found)
