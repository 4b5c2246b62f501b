"""What a run trains, if the recipe says so: each compressed block towards the dense one, or all blocks together."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from sparlow.distributed import Processes
from sparlow.model.artefact.dtypes import StoredDtypes
from sparlow.model.forward.activation_store import ActivationStore
from sparlow.model.forward.block_pass import BlockPass
from sparlow.model.forward.capture import Recording
from sparlow.model.training.block_matching import match
from sparlow.model.training.distillation import distill
from sparlow.model.training.loop import Plan
from sparlow.model.training.packed_layer import round_through
from sparlow.model.training.resume_state import TrainingCheckpoint
from sparlow.progress import Notify, counting
from sparlow.recipe.recipe import Recipe
from sparlow.recipe.training_plan import HELD_OUT, micro_batch, plan_of


class Recovery:
    """Matching and distillation of one run, and how its calibration windows are divided for them.

    Args:
        recipe: What to do.
        storage: The types of the result, to which whatever was trained is rounded.
        blocks_name: Name of the list of decoder blocks in the model.
        windows: Calibration token ids (samples, seqlen).
        processes: Those that divide them; a step has a window for each at least.
    """

    def __init__(
        self, recipe: Recipe, storage: StoredDtypes, blocks_name: str, windows: Tensor, processes: Processes
    ) -> None:
        self._recipe, self._storage, self._blocks_name = recipe, storage, blocks_name
        self._processes = processes
        self.plan = plan_of(recipe, processes)
        # a plan that never stops early trains on all windows
        self.held_out = len(windows) // HELD_OUT if self.plan and self.plan.patience else 0
        self.micro_batch = micro_batch(recipe, windows.shape[1], processes)

    @property
    def by_block(self) -> bool:
        """Whether every block is trained by itself, as soon as its layers are compressed."""
        return self.plan is not None and not self.plan.together

    @property
    def together(self) -> bool:
        """Whether all blocks are trained together, when the last is compressed."""
        return self.plan is not None and self.plan.together

    @property
    def dense_targets(self) -> bool:
        """Whether blocks are matched to what the dense model has, not to what the dense block makes of their inputs."""
        return self.plan is not None and self.plan.dense_targets

    @property
    def warnings(self) -> list[str]:
        """What the user should know of the plan."""
        asked = plan_of(self._recipe)
        if self.plan is None or asked is None or self.plan.batch == asked.batch:
            return []
        return [f"{self.plan.batch} processes train on {self.plan.batch} windows a step, not on {asked.batch}"]

    def match_block(self, through: BlockPass, targets: ActivationStore) -> dict[str, Any]:
        """Train a compressed block towards its targets, rounded as it will be stored; return the row for the report."""
        found = match(
            through,
            targets,
            _given(self.plan),
            held_out=int(self.held_out > 0),
            seed=self._recipe.seed + through.number,
        )
        self._round(through.number, through.block)
        return {"block": through.number, **asdict(found)}

    def distill(
        self,
        model: PreTrainedModel,
        blocks: Sequence[nn.Module],
        recording: Recording,
        truth: ActivationStore,
        notify: Notify,
        midway: TrainingCheckpoint | None = None,
    ) -> dict[str, Any]:
        """Train all blocks together towards ``truth``, rounded as they will be stored; return what the report says."""
        plan = _given(self.plan)
        found = distill(
            model,
            blocks,
            recording,
            truth,
            plan,
            held_out=int(self.held_out > 0),
            seed=self._recipe.seed,
            advance=counting(notify, "distillation", plan.epochs),
            processes=self._processes,
            midway=midway,
        )
        for i, block in enumerate(blocks):
            self._round(i, block)
        return asdict(found)

    def _round(self, i: int, block: nn.Module) -> None:
        """Give a trained block the values it will have once it was stored."""
        label = f"{self._blocks_name}.{i}"
        kept = [name for name, _ in block.named_parameters() if self._keeps(f"{label}.{name}")]
        round_through(block, self._storage.dtype, kept)

    def _keeps(self, name: str) -> bool:
        """Whether a parameter is stored in a type of its own."""
        return self._storage.of_tensor(name) != self._storage.dtype


def _given(plan: Plan | None) -> Plan:
    if plan is None:
        raise ValueError("the recipe trains nothing")
    return plan
