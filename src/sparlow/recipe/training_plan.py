"""How a recipe trains what is kept, and how many windows pass through a block at a time."""

from dataclasses import replace

from sparlow.distributed import ALONE, Processes
from sparlow.model.training import block_matching, distillation
from sparlow.model.training.loop import Plan
from sparlow.recipe.recipe import Recipe

PRESETS = {**distillation.PRESETS, **block_matching.PRESETS}
MICRO_BATCH_TOKENS = 2048  # that pass through a block at a time; twice as many take a tenth longer on a CPU
HELD_OUT = 16  # one calibration window of so many judges the training


def micro_batch(recipe: Recipe, seqlen: int, processes: Processes = ALONE) -> int:
    """Windows that pass through a block at a time, in all processes; while training, no more than a step takes."""
    windows = max(MICRO_BATCH_TOKENS // seqlen, 1) * processes.size
    plan = plan_of(recipe, processes)
    return min(windows, plan.batch) if plan else windows


def plan_of(recipe: Recipe, processes: Processes = ALONE) -> Plan | None:
    """The preset of matching, with what the recipe says otherwise; None if nothing is trained.

    A step has a window for each process at least.
    """
    if not recipe.match:
        return None
    preset = PRESETS[recipe.match_preset]
    return replace(
        preset,
        epochs=recipe.match_epochs or preset.epochs,  # none of these may be 0
        lr=recipe.match_lr or preset.lr,
        batch=max(recipe.match_batch or preset.batch, processes.size),
    )
