"""Transformer matching: train a compressed block towards what the dense block gave; zeros stay zero.

    minimise  Σ ‖T_compressed(x) − T_dense(x)‖²   over S on its support, U, V, biases and norms of the block

Section 4 of the 3BASiL paper (Makni et al., 2025, arXiv 2603.01376). x are the inputs that come out of the compressed
blocks before. Adam sees the kept entries of S alone, in one vector a layer: its moments take half the memory at 2:4.
The sum is over all tokens of all windows alike, divided by one number for all: how large the targets are (and not by
each micro-batch's own, which would give small ones the weight of large ones).

Beyond the paper, and each can be set (``BlockOutputs``, ``TrainingPlan``): the target is what the dense model has at
this place, so that a block makes up for the blocks before it too; the error of a token is measured against that token's
own size, for the next block begins with a norm, and a few tokens with massive features would else decide everything;
some windows are held out, and training stops when their loss does not fall any more; a higher rate and smaller steps
need fewer epochs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparlow.model.forward.block_pass import BlockPass, run_block
from sparlow.model.training.loop import Loss, MicroBatches, TrainingPlan, TrainingResult, train


@dataclass(frozen=True)
class BlockOutputs:
    """The objective: each block's outputs, block by block.

    Attributes:
        relative: Measure each token's error against its own size instead of adding up all tokens' alike.
        from_dense: The targets are what the dense model has at this place; otherwise what the dense block makes of the
            compressed blocks' outputs before it.
    """

    relative: bool
    from_dense: bool


def match(
    through: BlockPass,
    data: MicroBatches,
    objective: BlockOutputs,
    plan: TrainingPlan,
    *,
    seed: int = 0,
) -> TrainingResult:
    """Train a block in place, in eval mode, and leave it with the parameters of the best epoch.

    Args:
        through: The block with its layers compressed, and how it is called; support and ranks stay as they are.
        data: What enters the block, and what the dense one gives, (windows, seqlen, …) for each micro-batch.
        objective: How errors are measured.
        plan: The schedule.
        seed: Random seed for the order of the micro-batches.

    Returns:
        Losses relative to the size of the targets.

    Raises:
        RunError: The loss is not finite.
    """
    loss = _loss(through, objective, data)
    return train(through.block, loss, data, plan, seed=seed, label=f"{through.label}: matching")


def loss_on(through: BlockPass, data: MicroBatches, objective: BlockOutputs) -> float:
    """Return what ``match`` would minimise, on the micro-batches that judge."""
    return data.judge(_loss(through, objective, data))


def _loss(through: BlockPass, objective: BlockOutputs, data: MicroBatches) -> Loss:
    device = through.device
    tiny = torch.finfo(torch.float32).tiny
    usual = 1.0 if objective.relative else max(data.mean(_size, data.judging), tiny)
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type != "cpu")

    def loss(i: int, x: Tensor, target: Tensor) -> Tensor:
        target = target.to(device).float()
        with autocast:
            y = run_block(through.block, x.float(), through.call(i))
        error = (y.float() - target).square().sum(-1)  # (b, seqlen, …)
        size = target.square().sum(-1).clamp_min(tiny) if objective.relative else usual
        return (error / size).mean()

    return loss


def _size(_: int, __: Tensor, target: Tensor) -> Tensor:
    """Mean over the tokens of a micro-batch of what the norm before the next block measures them against."""
    return target.float().square().sum(-1).mean()
