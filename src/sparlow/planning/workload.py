"""The work of a run in numbers: layers and their budgets, sizes of the model, tokens. From shapes alone."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from sparlow.evaluation.texts import require_context
from sparlow.machine import check_device, computing_dtype, pick_device
from sparlow.model._transformers import NO_STREAMING
from sparlow.model.artefact.dtypes import StoredDtypes
from sparlow.model.forward.activation_store import place
from sparlow.model.forward.attention import unfused_heads, windows_at_once
from sparlow.model.forward.chain_check import carried, require_chain
from sparlow.model.forward.compressible import CompressibleWeight, ExpertWeight
from sparlow.model.forward.decoder import Decoder, is_norm, require_own_weights
from sparlow.model.forward.fused_groups import in_groups
from sparlow.model.forward.roles import kept_dense
from sparlow.model.loading.meta import Inputs, inputs_of
from sparlow.recipe.allocation import Budget, Shape
from sparlow.recipe.budgets import Selection, select
from sparlow.recipe.recipe import Recipe
from sparlow.recipe.run_options import RunOptions
from sparlow.recipe.training_plan import Training, micro_batch, training_of
from sparlow.text import expected_windows

CHOSEN = ("num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts", "num_selected_experts")  # in configs


class Structure:
    """What the code of a model shows when it runs without weights.

    That takes seconds where there are many blocks, and is the same for every recipe: each part is found once.

    Args:
        model: A meta model, else the model itself, which stays where it is.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.decoder = model, Decoder.of(model)

    @cached_property
    def roles(self) -> Mapping[str, str]:
        """Layers that stay dense because of what they do, see ``kept_dense``."""
        return kept_dense(self.model, self.decoder)

    @cached_property
    def inputs(self) -> Sequence[Inputs]:
        """What the layers of each block read."""
        return inputs_of(self.model)


@dataclass(frozen=True)
class Layer:
    """One layer of a block that can be compressed.

    Attributes:
        name: Within the block.
        shape: (out, in).
        owner: The first layer of the block that reads the same input; they share a Gram matrix.
        bias: Whether it has one.
        budget: What it may keep; None if it stays dense.
        stage: Number of the pass in which its input is observed; None if it is not.
        role: Of an expert in a parameter that holds many: the name of that.
        share: Of the tokens, that reach it.
        routed: Whether it reads tokens of the module that calls it, all of which are observed beside.
    """

    name: str
    shape: Shape
    owner: str
    bias: bool
    budget: Budget | None
    stage: int | None = 0
    role: str = ""
    share: float = 1.0
    routed: bool = False

    @property
    def shown(self) -> str:
        """Its name, one for all experts of a role."""
        return f"{self.role}.*" if self.role else self.name

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
        """Number of values in U and V."""
        return self.budget.rank * sum(self.shape) if self.budget else 0

    @property
    def kept(self) -> int:
        """Number of values that are kept: entries of S, U, V and the bias."""
        return self.budget.values(self.shape) + self.shape[0] * self.bias if self.budget else self.parameters

    @property
    def trained(self) -> int:
        """Number of values that matching trains: kept entries of S, or the scales of their grid; U, V and the bias."""
        if self.budget is None:
            return 0
        grid = self.budget.grid
        codes = self.budget.pattern.kept(self.shape) - self.shape[0] * grid.groups(self.shape[1]) if grid else 0
        return self.kept - codes

    def kept_bytes(self, size: int) -> int:
        """Bytes as stored, numbers of ``size`` bytes each: what ``StoredDtypes.packed_bytes`` will find."""
        if self.budget is None:
            return self.parameters * size
        return self.budget.bytes(self.shape, size) + self.shape[0] * self.bias * size


@dataclass(frozen=True)
class Stage:
    """Layers of a block that are observed in one pass and compressed before the next.

    Attributes:
        layers: In module order.
    """

    layers: tuple[Layer, ...]

    @property
    def inputs(self) -> dict[str, int]:
        """Features of each distinct input, by its owner."""
        return {layer.owner: layer.shape[1] for layer in self.layers}

    @property
    def shares(self) -> dict[str, float]:
        """Which share of the tokens each of them is, by its owner."""
        return {layer.owner: layer.share for layer in self.layers}

    @property
    def pools(self) -> dict[str, int]:
        """Features of the tokens of which experts borrow, by the role of these."""
        return {layer.role: layer.shape[1] for layer in self.layers if layer.routed}

    @property
    def groups(self) -> list["Stage"]:
        """The layers whose Grams are in memory at the same time."""
        found = in_groups(
            {layer.name: layer.shape[1] for layer in self.layers}, {layer.role for layer in self.layers if layer.role}
        )
        by_name = {layer.name: layer for layer in self.layers}
        return [Stage(tuple(by_name[name] for name in group)) for group in found]

    @property
    def compressed(self) -> list[Layer]:
        """The layers that are compressed."""
        return [layer for layer in self.layers if layer.budget]

    @property
    def experts(self) -> int:
        """Entries of W of all experts."""
        return sum(layer.weights for layer in self.layers if layer.role)


@dataclass(frozen=True)
class Block:
    """One decoder block.

    Attributes:
        layers: What can be compressed in it, in module order.
        parameters: All of them, those of other modules included.
        norms: Of these, the weights and biases of norms.
    """

    layers: tuple[Layer, ...]
    parameters: int
    norms: int

    @property
    def passed(self) -> int:
        """Parameters that a token passes through: of experts, those that are chosen for it."""
        return self.parameters - round(sum(layer.weights * (1 - layer.share) for layer in self.layers))

    @property
    def compressed(self) -> list[Layer]:
        """The layers that are compressed."""
        return [layer for layer in self.layers if layer.budget]

    @property
    def low_rank(self) -> int:
        """Number of values in U and V of all layers."""
        return sum(layer.low_rank for layer in self.layers)

    @property
    def stages(self) -> list["Stage"]:
        """What is observed in one pass after the other."""
        numbers = sorted({layer.stage for layer in self.layers if layer.stage is not None})
        return [Stage(tuple(layer for layer in self.layers if layer.stage == number)) for number in numbers]

    @property
    def inputs(self) -> dict[str, int]:
        """Features of each distinct input that is observed, by its owner."""
        return {owner: features for stage in self.stages for owner, features in stage.inputs.items()}

    @property
    def trained(self) -> int:
        """Number of values that matching trains."""
        return self.norms + sum(layer.trained for layer in self.layers)

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
        selection: What the recipe means for the layers, and for the embedding and the output head.
        structure: Of the model.
        offload: Where hidden states wait, as asked for.
        streamed: The weights stay on disk, and one part at a time is read.
        there: The whole model is in memory already.
        copied: It stays as it is, and copies of its blocks are compressed.
        processes: Those that divide the calibration windows.
        carried: Numbers of a token in a copy of the hidden states, if more than features. What else the text decides of
            the blocks' arguments is there once; it is counted here with half, as there are two copies at least.
        heads: Of the attention of a block, where it holds all scores, see ``attention.unfused_heads``; else 0.
        out: Directory that is written. Hidden states that wait on disk lie there, or in the folder of temporary files.
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
    selection: Selection
    structure: Structure = field(repr=False, compare=False)
    offload: str = "auto"
    streamed: bool = True
    there: bool = False
    copied: bool = False
    processes: int = 1
    carried: int = 0
    heads: int = 0
    out: Path | None = None

    @property
    def stored(self) -> int:
        """Bytes of one value in files."""
        return self.stored_in.itemsize

    @property
    def computing(self) -> int:
        """Bytes of one value in the type of the computation."""
        return self.computed_in.itemsize

    @property
    def kinds(self) -> list[tuple[Shape, Budget]]:
        """Shape and budget of every layer that is compressed."""
        return [(layer.shape, layer.budget) for block in self.blocks for layer in block.layers if layer.budget]

    @property
    def parameters(self) -> int:
        """Number of parameters of the model, tied ones once."""
        return self.outside + sum(block.parameters for block in self.blocks)

    @property
    def tokens(self) -> int:
        """Number of tokens of the calibration text."""
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
    def by_block(self) -> Training | None:
        """How every block is trained by itself, if it is."""
        training = training_of(self.recipe, self.processes)
        return None if training is None or training.together else training

    @property
    def together(self) -> Training | None:
        """How all blocks are trained together, if they are."""
        training = training_of(self.recipe, self.processes)
        return training if training and training.together else None

    @property
    def batch(self) -> int:
        """Tokens of the calibration text that pass through a block at a time, in one process."""
        windows = min(micro_batch(self.recipe, self.at_once(self.recipe.seqlen), self.processes), self.recipe.samples)
        return -(-windows // self.processes) * self.recipe.seqlen

    def at_once(self, seqlen: int) -> int:
        """Return how many windows of so many tokens pass through a block together, in one process."""
        return windows_at_once(seqlen, self.heads)

    @cached_property
    def place(self) -> torch.device | str:
        """Where the hidden states of the calibration text are kept."""
        return place(self.offload, self.hidden, self.device, self.folder, trained=self.recipe.match)

    def where(self, size: int) -> torch.device | str:
        """Where hidden states of a text that is measured are kept, of which a copy has so many bytes."""
        return place(self.offload, size, self.device, self.folder)

    @property
    def folder(self) -> Path:
        """The folder of hidden states that are kept on disk."""
        return Path(tempfile.gettempdir()) if self.out is None else self.out

    @property
    def evaluated_hidden(self) -> int:
        """Bytes of one copy of the hidden states of the longest text that is measured, those of one process."""
        return self.evaluated * max(self.carried, self.features) * self.computing // self.processes

    @property
    def predictions(self) -> int:
        """Bytes of the dense model's states that are kept for all texts until the result is measured, of one process.

        Every text counts twice, for it may be measured again behind the token that a tokenizer begins a text with.
        """
        tokens = 2 * sum(self.evaluation.values()) * self.evaluate_seqlen
        return tokens * max(self.carried, self.features) * self.computing // self.processes

    @property
    def kept_bytes(self) -> int:
        """Of the whole result, without the shards' headers."""
        outside = self.outside * self.stored - self.selection.ends.saved
        return outside + sum(block.kept_bytes(self.stored) for block in self.blocks)


def workload(
    structure: Structure,
    recipe: Recipe,
    options: RunOptions,
    *,
    streamed: bool = True,
    processes: int = 1,
    out: Path | None = None,
) -> Workload:
    """Look at the shapes of a model, which may be a meta model.

    Args:
        structure: Of the model.
        recipe: What is done.
        options: How it is done.
        streamed: The result is written block by block, and the weights of a meta model are read part by part.
        processes: Those that divide the calibration windows.
        out: Directory that is written.

    Raises:
        InputError: A layer does not fit the recipe, the blocks cannot be replayed or written one by one, a text does
            not exist, or the device cannot be used.
    """
    device, evaluate = pick_device(options.device), options.evaluate
    check_device(device)
    model, decoder = structure.model, structure.decoder
    there = not next(model.parameters()).is_meta
    where = model.device if there else torch.device(device)
    storage = StoredDtypes.of(model)
    selection = select(model, decoder, recipe, storage, structure.roles)
    found = _blocks(structure, selection.budgets, recipe)
    seqlen = max(options.evaluate_seqlen or recipe.seqlen, 2)
    _require_possible(model, decoder, [recipe.seqlen, *([seqlen] if evaluate else [])])
    stored, config = storage.dtype, model.config.get_text_config()
    return Workload(
        name=decoder.name,
        blocks=found,
        outside=sum(p.numel() for p in model.parameters()) - sum(block.parameters for block in found),
        largest=max(p.numel() for p in model.parameters()),
        features=config.hidden_size,
        vocabulary=config.vocab_size,
        stored_in=stored,
        computed_in=stored if there else computing_dtype(stored, where),
        recipe=recipe,
        evaluation={
            name: expected_windows(name, config.vocab_size, seqlen=seqlen, limit=options.limit, column=recipe.column)
            for name in evaluate
        },
        evaluate_seqlen=seqlen,
        device=where,
        offload=options.offload,
        streamed=streamed and not there and not NO_STREAMING,
        there=there,
        copied=there and streamed,
        processes=processes,
        carried=carried(model),
        heads=unfused_heads(config),
        out=out,
        selection=selection,
        structure=structure,
    )


def _require_possible(model: PreTrainedModel, decoder: Decoder, lengths: Sequence[int]) -> None:
    """Raise InputError unless the blocks can be replayed and written one by one, on windows of these lengths."""
    if next(model.parameters()).is_meta:
        require_chain(model)
    require_own_weights(model, decoder)
    for tokens in lengths:
        require_context(model, tokens)


def _blocks(structure: Structure, kept: Mapping[str, Budget], recipe: Recipe) -> tuple[Block, ...]:
    found, decoder, config = [], structure.decoder, structure.model.config.get_text_config()
    for i, read in enumerate(structure.inputs):
        own = {name: kept.get(decoder.layer_name(i, name)) for name in read.owners}
        stages = _stages(read, own, recipe)
        layers = (
            Layer(
                *(name, weight.shape, read.owners[name], weight.bias is not None, own[name], stages.get(name)),
                **_of_expert(weight, config),
            )
            for name, weight in decoder.weights(i).items()
        )
        block = decoder.blocks[i]
        norms = {p for module in block.modules() if is_norm(module) for p in module.parameters(recurse=False)}
        found.append(Block(tuple(layers), *(sum(p.numel() for p in some) for some in (block.parameters(), norms))))
    return tuple(found)


def _of_expert(weight: CompressibleWeight, config: Any) -> dict[str, Any]:  # noqa: ANN401 - a foreign config
    if not isinstance(weight, ExpertWeight):
        return {}
    parts = (config, *(part for part in vars(config).values() if isinstance(part, PreTrainedConfig)))
    found = (getattr(part, name, None) for part in parts for name in CHOSEN)
    chosen = next((n for n in found if type(n) is int), weight.layout.experts)
    share = min(chosen / weight.layout.experts, 1.0)
    return {"role": weight.fused, "share": share, "routed": weight.layout.routed}


def _stages(read: Inputs, kept: Mapping[str, Budget | None], recipe: Recipe) -> dict[str, int]:
    """Number of the pass in which each layer's input is observed."""
    if recipe.behind == "blocks":
        return dict.fromkeys(kept, 0)
    stages, _ = read.dependences.stages([name for name, budget in kept.items() if budget])
    return {name: number for number, stage in enumerate(stages) for name in stage.names}
