"""The training that a recipe asks for, the windows in a micro-batch, and the last block whose inputs are needed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sparlow.model.training.block_matching import BlockOutputs
from sparlow.model.training.distillation import Logits
from sparlow.model.training.loop import TrainingPlan
from sparlow.recipe.recipe import Recipe

HELD_OUT = 16  # one calibration window of so many judges the training


@dataclass(frozen=True)
class Training:
    """The objective and the schedule of a training."""

    objective: BlockOutputs | Logits
    plan: TrainingPlan

    @property
    def together(self) -> bool:
        """Whether all blocks are trained together, when the last is compressed."""
        return isinstance(self.objective, Logits)

    @property
    def dense_targets(self) -> bool:
        """Whether each block is trained towards the hidden states of the dense model."""
        return isinstance(self.objective, BlockOutputs) and self.objective.from_dense


PRESETS = {  # of ``match_preset``; ``recipe.MATCH_PRESETS`` has their names
    "logits": Training(Logits(), TrainingPlan(epochs=1, lr=2e-4, low_rank_lr=5e-5, batch=2, patience=1)),
    "blocks": Training(
        BlockOutputs(relative=True, from_dense=True),
        TrainingPlan(epochs=3, lr=2e-4, low_rank_lr=2e-4, batch=2, patience=1),
    ),
    "paper": Training(  # as published: arXiv 2603.01376, section 4
        BlockOutputs(relative=False, from_dense=False),
        TrainingPlan(epochs=20, lr=2e-5, low_rank_lr=2e-5, batch=8, patience=0),
    ),
}


def training_of(recipe: Recipe, processes: int = 1) -> Training | None:
    """Return the preset of matching with the recipe's changes; None if nothing is trained.

    A step has a window for each process at least. Another learning rate is that of S; U and V keep their share of it.
    """
    if not recipe.match:
        return None
    preset = PRESETS[recipe.match_preset]
    usual = preset.plan
    lr = recipe.match_lr or usual.lr  # none of these may be 0
    plan = replace(
        usual,
        epochs=recipe.match_epochs or usual.epochs,
        lr=lr,
        low_rank_lr=lr * (usual.low_rank_lr / usual.lr),
        batch=max(recipe.match_batch or usual.batch, processes),
    )
    return replace(preset, plan=plan)


def micro_batch(recipe: Recipe, at_once: int, processes: int = 1) -> int:
    """Return the windows in a micro-batch of all processes; while training, no more than a step has.

    Args:
        recipe: What is done.
        at_once: Windows that pass through a block together in one process.
        processes: Those that divide every micro-batch.
    """
    windows = at_once * processes
    training = training_of(recipe, processes)
    return min(windows, training.plan.batch) if training else windows


def last_read(compressed: Sequence[bool], training: Training | None) -> int:
    """Return the last block whose inputs are needed: nothing has to pass through it or the blocks behind it.

    Args:
        compressed: Of each block, whether any layer of it is compressed.
        training: Of the recipe; where every block is trained by itself, every input is looked at.
    """
    if training and not training.together:
        return len(compressed) - 1
    return max(i for i, one in enumerate(compressed) if one)
