"""Transformer matching: train a compressed block towards what the dense block gave; zeros stay zero.

    minimise  Σ ‖T_compressed(x) − T_dense(x)‖²   over every parameter of the block, S on its support only

Section 4 of the 3BASiL paper (Makni et al., 2025, arXiv 2603.01376). x are the inputs that come out of the compressed
blocks before. Adam sees the kept entries of S alone, in one vector a layer: its moments take half the memory at 2:4.

Beyond the paper, and each can be set (``Plan``): the target is what the dense model has at this place, so that a block
makes up for the blocks before it too; the error of a token is measured against that token's own size, for the next
block begins with a norm, and a few tokens with massive features would else decide everything; some windows are held
out, and training stops when their loss does not fall any more; a higher rate and smaller steps need fewer epochs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparlow.distributed import ALONE
from sparlow.model.forward.block_pass import BlockPass, run_block
from sparlow.model.training.loop import Loss, MicroBatches, Plan, TrainingResult, train

PRESETS = {
    "blocks": Plan(epochs=3, lr=2e-4, batch=2, relative=True, patience=1, dense_targets=True),
    "paper": Plan(epochs=20, lr=2e-5, batch=8, relative=False, patience=0),
}


def match(
    through: BlockPass,
    targets: Sequence[Tensor],
    plan: Plan,
    *,
    held_out: int = 0,
    seed: int = 0,
) -> TrainingResult:
    """Train a block in place, in eval mode, and leave it with the parameters of the best epoch.

    Args:
        through: The block with its layers compressed, and what enters it; support and ranks stay as they are. Of
            several processes that divide every micro-batch, gradients are added up.
        targets: What the dense block gives for its inputs, (windows, seqlen, …) for each micro-batch, on any device.
        plan: How.
        held_out: So many micro-batches at the end are not trained on, but decide which epoch was best.
        seed: Of the order of the micro-batches.

    Raises:
        RunError: The loss is not finite.
    """
    return train(
        through.block,
        _loss(through, relative=plan.relative),
        through.hidden,
        targets,
        plan,
        held_out=held_out,
        seed=seed,
        label=f"{through.label}: matching",
        advice="lower --match-lr",
        processes=through.processes,
    )


def loss_on(through: BlockPass, targets: Sequence[Tensor], chosen: Sequence[int], *, relative: bool) -> float:
    """Return what ``match`` would minimise, over the chosen micro-batches; see there for the other arguments."""
    return MicroBatches(through.hidden, targets, ALONE).judged(_loss(through, relative=relative), chosen)


def _loss(through: BlockPass, *, relative: bool) -> Loss:
    device = through.device
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type != "cpu")

    def loss(i: int, x: Tensor, target: Tensor) -> Tensor:
        target = target.to(device).float()
        with autocast:
            y = run_block(through.block, x.float(), through.call(i))
        error = (y.float() - target).square().sum(-1)  # (b, seqlen, …)
        size = target.square().sum(-1)
        return (error / size.clamp_min(torch.finfo(size.dtype).tiny)).mean() if relative else error.sum() / size.sum()

    return loss
