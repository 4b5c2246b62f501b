"""Training after compression, if the recipe asks for it: each block towards the dense one, or all blocks together."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from sparlow.distributed import Processes
from sparlow.model.artefact.dtypes import StoredDtypes
from sparlow.model.forward.activation_store import ActivationStore
from sparlow.model.forward.attention import windows_at_once
from sparlow.model.forward.block_pass import BlockPass
from sparlow.model.forward.capture import Recording
from sparlow.model.training.block_matching import match
from sparlow.model.training.distillation import Logits, distill
from sparlow.model.training.loop import MicroBatches
from sparlow.model.training.packed_layer import round_through
from sparlow.model.training.resume_state import TrainingCheckpoint
from sparlow.model.training.unmoved import Unmoved, undone
from sparlow.progress import Notify, counting
from sparlow.recipe.recipe import Recipe
from sparlow.recipe.training_plan import HELD_OUT, micro_batch, training_of


class Recovery:
    """Matching and distillation of one run, and how its calibration windows are divided for them.

    Args:
        recipe: What to do.
        storage: The types of the result, to which trained weights are rounded.
        blocks_name: Name of the list of decoder blocks in the model.
        windows: Calibration token ids (samples, seqlen).
        heads: Of attention that has no fused kernel, see ``attention.unfused_heads``.
        processes: The processes that divide the windows. Each step has at least one window for each process.
    """

    def __init__(
        self,
        recipe: Recipe,
        storage: StoredDtypes,
        blocks_name: str,
        windows: Tensor,
        heads: int,
        processes: Processes,
    ) -> None:
        self._recipe, self._storage, self._blocks_name = recipe, storage, blocks_name
        self._processes = processes
        self.training = training_of(recipe, processes.size)
        # a plan that never stops early trains on all windows
        self.held_out = len(windows) // HELD_OUT if self.training and self.training.plan.patience else 0
        self.micro_batch = micro_batch(recipe, windows_at_once(windows.shape[1], heads), processes.size)

    @property
    def by_block(self) -> bool:
        """Whether each block is trained by itself, as soon as its layers are compressed."""
        return self.training is not None and not self.training.together

    @property
    def together(self) -> bool:
        """Whether all blocks are trained together, after the last is compressed."""
        return self.training is not None and self.training.together

    @property
    def dense_targets(self) -> bool:
        """Whether targets are the dense model's hidden states, not the dense block's outputs for compressed inputs."""
        return self.training is not None and self.training.dense_targets

    @property
    def warnings(self) -> list[str]:
        """What the user should know about the training."""
        asked = training_of(self._recipe)
        if self.training is None or asked is None or self.training.plan.batch == asked.plan.batch:
            return []
        batch = self.training.plan.batch
        return [f"{batch} processes train on {batch} windows in each step, not on {asked.plan.batch}."]

    def match_block(self, through: BlockPass, targets: ActivationStore) -> dict[str, Any]:
        """Train a compressed block towards its targets, and round it as it will be stored; return the report's row."""
        training = self.training
        if training is None or isinstance(training.objective, Logits):
            raise ValueError("The recipe does not train blocks by themselves.")
        data, seed = self._data(through.hidden, targets), self._recipe.seed + through.number
        before = Unmoved(through.block)
        found = match(through, data, training.objective, training.plan, seed=seed)
        self._round(through.number, through.block)
        return {"block": through.number, **asdict(found), "unmoved": before.share()}

    def distill(
        self,
        model: PreTrainedModel,
        blocks: Sequence[nn.Module],
        recording: Recording,
        truth: ActivationStore,
        notify: Notify,
        checkpoint: TrainingCheckpoint | None = None,
    ) -> dict[str, Any]:
        """Train all blocks together towards ``truth``, round them as they will be stored; return the report's entry."""
        if self.training is None:
            raise ValueError("The recipe trains nothing.")
        plan, data = self.training.plan, self._data(recording.hidden, truth)
        advance, before = counting(notify, "distillation", plan.epochs), Unmoved(nn.ModuleList(blocks))
        found = distill(
            model, blocks, recording, data, plan, seed=self._recipe.seed, advance=advance, checkpoint=checkpoint
        )
        for i, block in enumerate(blocks):
            self._round(i, block)
        return {**asdict(found), "unmoved": before.share()}

    def undone(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """Warn of trainings that gained, but were lost in rounding; ``rows`` are what the other methods returned."""
        gained = [row for row in rows if row and row["loss_after"] < row["loss_before"] and "unmoved" in row]
        share = min((row["unmoved"] for row in gained), default=0.0)
        said = undone(share, self._storage.dtype)
        return [f"{said}: raise --match-lr, or give --dtype float32"] if said else []

    def _data(self, inputs: ActivationStore, targets: ActivationStore) -> MicroBatches:
        """Pair targets with inputs. The windows held out are in micro-batches of their own, the last ones."""
        return MicroBatches(inputs, targets, -(-self.held_out // self.micro_batch), self._processes)

    def _round(self, i: int, block: nn.Module) -> None:
        """Round a trained block as it will be stored."""
        label = f"{self._blocks_name}.{i}"
        kept = [name for name, _ in block.named_parameters() if self._keeps(f"{label}.{name}")]
        round_through(block, self._storage.dtype, kept)

    def _keeps(self, name: str) -> bool:
        """Whether a parameter is stored in a type of its own."""
        return self._storage.of_tensor(name) != self._storage.dtype
