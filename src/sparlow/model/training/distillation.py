"""Distillation: all compressed blocks are trained together towards the dense model's logits; zeros stay zero.

    minimise  Σ KL(softmax(dense logits) ‖ softmax(compressed logits))   over S on its support, U, V, biases, norms

Beyond the 3BASiL paper (Makni et al., 2025, arXiv 2603.01376), whose matching ends at each block: what the errors of
all blocks together do to the answer is only seen here. What is behind the blocks is not trained. Unlike all the rest of
a compression this needs every block in memory at once, with gradients and the two moments of Adam.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint as computed_again
from transformers import PreTrainedModel

from sparlow.model.forward.activation_store import Shared
from sparlow.model.forward.block_pass import run_block
from sparlow.model.forward.calls import NOTHING, BlockCalls
from sparlow.model.forward.capture import Recording, run_head, tokens_at_once
from sparlow.model.forward.stand_ins import Form
from sparlow.model.training.logit_pieces import PIECES, summed_in_pieces
from sparlow.model.training.loop import MicroBatches, TrainingPlan, TrainingResult, train
from sparlow.model.training.resume_state import TrainingCheckpoint


@dataclass(frozen=True)
class Logits:
    """The objective: the dense model's logits, all blocks together."""


class _Chain(nn.Module):
    """The blocks one after the other."""

    def __init__(self, blocks: Sequence[nn.Module], calls: Sequence[BlockCalls]) -> None:
        super().__init__()
        self.blocks, self._calls = nn.ModuleList(blocks), calls
        self.train(blocks[0].training)  # a chain of its own would leave all blocks in training mode, dropout included

    def forward(self, i: int, x: Tensor) -> Tensor:
        """Return what leaves the last block for x (b, seqlen, …) of micro-batch i, which enters the first.

        For gradients only what enters each block is kept. What is inside is computed again when its turn comes: a pass
        more, of three, for the activations of one block instead of all.
        """
        x = x.float()  # what blocks add to it stays in float32, and so do its gradients
        device, shared = next(self.parameters()).device, NOTHING
        for block, calls in zip(self.blocks, self._calls, strict=True):
            left: list[Shared] = []
            run = partial(_run, block, calls, i, device, shared, left)
            if torch.is_grad_enabled():
                x = computed_again(
                    run, x, use_reentrant=False, preserve_rng_state=False
                )  # nothing is drawn in eval mode
            else:
                x = run(x)
            shared = left[0]
        return x


def _run(
    block: nn.Module,
    calls: BlockCalls,
    i: int,
    device: torch.device,
    shared: Shared,
    left: list[Shared],
    x: Tensor,
) -> Tensor:
    """Run a block; what it leaves for others behind it goes to ``left``, the first time that it runs."""
    call = calls.at(i, device, shared)
    y = run_block(block, x, call)
    if not left:
        left.append(call.written())
    return y


@dataclass(frozen=True)
class _Divergence:
    """Mean over tokens of the divergence of two models that differ in their blocks only."""

    chain: _Chain
    model: PreTrainedModel
    output: Form

    def __call__(self, i: int, x: Tensor, wanted: Tensor) -> Tensor:
        """Of micro-batch i (b, seqlen, …) what enters the blocks and what leaves the dense ones.

        Logits are taken a few tokens at a time, and each piece gives its gradient to what leaves the blocks at once, so
        that no two pieces are in memory together.
        """
        device = next(self.chain.parameters()).device
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type != "cpu"):
            left = self.chain(i, x)
        goal = wanted.to(device)
        size = tokens_at_once(self.model, len(left) * PIECES)
        tokens = left.shape[0] * left.shape[1]
        return summed_in_pieces(left, size, lambda piece, at: self._of(piece, goal[:, at]), tokens)

    def _of(self, piece: Tensor, goal: Tensor) -> Tensor:
        found = self._log_probabilities(piece.to(goal.dtype))  # what is behind the blocks keeps the model's own type
        with torch.no_grad():
            wanted = self._log_probabilities(goal)
        return functional.kl_div(found, wanted, log_target=True, reduction="sum")

    def _log_probabilities(self, state: Tensor) -> Tensor:
        ids = torch.zeros(state.shape[:2], dtype=torch.int64)  # what is behind the blocks does not look at them
        return functional.log_softmax(run_head(self.model, self.output, ids, state).float(), dim=-1)


def distill(
    model: PreTrainedModel,
    blocks: Sequence[nn.Module],
    recording: Recording,
    data: MicroBatches,
    plan: TrainingPlan,
    *,
    seed: int = 0,
    advance: Callable[[int], None] = lambda _: None,
    checkpoint: TrainingCheckpoint | None = None,
) -> TrainingResult:
    """Train all ``blocks`` in place and leave them with the parameters of the best epoch.

    Args:
        model: What is before and behind the blocks has its weights; it stays as it is.
        blocks: Of the model, compressed, all of them in memory.
        recording: How each block is called.
        data: What enters the first block for the calibration windows, and what leaves the last dense one; of several
            processes each has all blocks.
        plan: The schedule.
        seed: Random seed for the order of the micro-batches.
        advance: Called with 1 after every epoch.
        checkpoint: Keeps the state from time to time, and has the one to resume from.

    Returns:
        Losses in nats a token.

    Raises:
        RunError: The loss is not finite.
    """
    chain = _Chain(blocks, recording.calls)
    loss = _Divergence(chain, model, recording.output)
    outside = [p for p in model.parameters() if p.requires_grad]
    for p in outside:
        p.requires_grad = False
    try:
        return train(chain, loss, data, plan, seed=seed, label="Distillation", advance=advance, checkpoint=checkpoint)
    finally:
        for p in outside:
            p.requires_grad = True
