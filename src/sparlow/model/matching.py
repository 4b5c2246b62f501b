"""Transformer matching: train a compressed block towards what the dense block gave; zeros stay zero.

    minimise  Σ ‖T_compressed(x) − T_dense(x)‖²   over every parameter of the block, S on its support only

Section 4 of the 3BASiL paper (Makni et al., 2025, arXiv 2603.01376). x are the inputs that come out of the compressed
blocks before. Adam sees the kept entries of S alone, in one vector a layer: its moments take half the memory at 2:4.

Beyond the paper, and each can be set (``Plan``): the target is what the dense model has at this place, so that a block
makes up for the blocks before it too; the error of a token is measured against that token's own size, for the next
block begins with a norm, and a few tokens with massive features would else decide everything; some windows are held
out, and training stops when their loss does not fall any more; a higher rate and smaller steps need fewer epochs.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparlow.errors import RunError
from sparlow.model.blocks import Call, run_block
from sparlow.model.trainable import Packed, packed


@dataclass(frozen=True)
class Plan:
    """How a block is matched.

    Attributes:
        epochs: At most.
        lr: Of Adam for S, U and V; falls along a cosine to a fifth.
        rest_lr: The same for norms, biases and layers that stayed dense.
        batch: Windows a step.
        relative: Measure each token's error against its own size instead of all tokens' together.
        patience: Epochs without gain on the held-out windows after which training ends; 0 for never.
        dense_targets: The targets come from the dense model throughout (x from its own blocks before), not from the
            dense block fed by the compressed blocks before.
    """

    epochs: int
    lr: float
    rest_lr: float
    batch: int
    relative: bool
    patience: int
    dense_targets: bool = False


PRESETS = {
    "default": Plan(epochs=3, lr=2e-4, rest_lr=2e-4, batch=2, relative=True, patience=1, dense_targets=True),
    "paper": Plan(epochs=20, lr=2e-5, rest_lr=2e-5, batch=8, relative=False, patience=0),
}


@dataclass(frozen=True)
class Matched:
    """What matching did; losses are relative to the size of the targets, on the held-out windows if there are any."""

    loss_before: float
    loss_after: float
    epochs: int
    seconds: float


def match(
    block: nn.Module,
    calls: Mapping[int, Call],
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    plan: Plan,
    *,
    held_out: int = 0,
    seed: int = 0,
    label: str = "block",
) -> Matched:
    """Train ``block`` in place, in eval mode, and leave it with the parameters of the best epoch.

    Args:
        block: With its linear layers compressed; support and ranks stay as they are.
        calls: How it is called, by number of windows.
        inputs: (b, seqlen, d) for each micro-batch, on any device.
        targets: What the dense block gives for them, likewise.
        plan: How.
        held_out: So many micro-batches at the end are not trained on, but decide which epoch was best.
        seed: Of the order of the micro-batches.
        label: How errors call the block.

    Raises:
        RunError: The loss is not finite.
    """
    device = next(block.parameters()).device
    calls = {size: call.to(device) for size, call in calls.items()}
    loss_of = _loss(block, calls, device, relative=plan.relative)
    return fit(
        block,
        loss_of,
        inputs,
        targets,
        plan,
        held_out=held_out,
        seed=seed,
        label=f"{label}: matching",
        advice="lower --match-lr",
    )


def fit(
    block: nn.Module,
    loss_of: "Loss",
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    plan: Plan,
    *,
    held_out: int,
    seed: int,
    label: str,
    advice: str,
    advance: Callable[[int], None] = lambda _: None,
) -> Matched:
    """Train the parameters of ``block`` by any loss; see ``match``.

    Args:
        block: What ``loss_of`` runs.
        loss_of: The loss of one micro-batch, from its input and target.
        inputs: (b, seqlen, d) for each micro-batch.
        targets: Likewise.
        plan: How.
        held_out: Micro-batches at the end that judge.
        seed: Of their order.
        label: How errors call the training.
        advice: What errors tell the user to do.
        advance: Called with 1 after every epoch.
    """
    start = time.perf_counter()
    parted = len(inputs) - held_out
    train = _Pairs(inputs, targets, range(parted))
    judge = _Pairs(inputs, targets, range(parted, len(inputs))) if held_out else train
    order = torch.Generator().manual_seed(seed)
    with packed(block) as values, torch.enable_grad():
        optimiser, schedule = _adam(block, values, plan, steps=plan.epochs * _steps(train, plan.batch))
        best = before = _judged(loss_of, judge)
        _require_finite(block, [before], f"{label} cannot begin", advice)
        state, waited, epoch = _copy(block), 0, 0
        for epoch in range(1, plan.epochs + 1):
            shuffled = torch.randperm(parted, generator=order).tolist()
            losses = _epoch(_Pairs(inputs, targets, shuffled), loss_of, optimiser, schedule, plan.batch)
            loss = _judged(loss_of, judge)
            _require_finite(block, [*losses, loss], f"{label} diverged in epoch {epoch}", advice)
            advance(1)
            waited = 0 if loss < best else waited + 1
            if loss < best:
                best, state = loss, _copy(block)
            if plan.patience and waited >= plan.patience:
                break
        block.load_state_dict(state)
    return Matched(before, best, epoch, time.perf_counter() - start)


Loss = Callable[[Tensor, Tensor], Tensor]  # (inputs, targets) of one micro-batch → mean over its tokens
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class _Pairs:
    """Some micro-batches with their targets, read when their turn comes."""

    inputs: Sequence[Tensor]
    targets: Sequence[Tensor]
    chosen: Sequence[int]

    def __iter__(self) -> Iterator[Pair]:
        return ((self.inputs[i], self.targets[i]) for i in self.chosen)


def loss_on(
    block: nn.Module,
    calls: Mapping[int, Call],
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    *,
    relative: bool,
) -> float:
    """Return what ``match`` would minimise, for windows of its own; the arguments are those of ``match``."""
    device = next(block.parameters()).device
    return _judged(_loss(block, calls, device, relative=relative), _Pairs(inputs, targets, range(len(inputs))))


def _loss(block: nn.Module, calls: Mapping[int, Call], device: torch.device, *, relative: bool) -> Loss:
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type != "cpu")

    def loss(x: Tensor, target: Tensor) -> Tensor:
        target = target.to(device).float()
        with autocast:
            y = run_block(block, x, calls[len(x)])
        error = (y.float() - target).square().sum(-1)  # (b, seqlen)
        size = target.square().sum(-1)
        return (error / size.clamp_min(torch.finfo(size.dtype).tiny)).mean() if relative else error.sum() / size.sum()

    return loss


@torch.no_grad()
def _judged(loss_of: Loss, pairs: Iterable[Pair]) -> float:
    """Mean over windows."""
    total, windows = torch.zeros(()), 0
    for x, target in pairs:
        total = total + loss_of(x, target) * len(x)
        windows += len(x)
    return float(total) / windows


def _epoch(
    pairs: Iterable[Pair],
    loss_of: Loss,
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    batch: int,
) -> list[float]:
    """One pass; gradients of micro-batches are added up until a step has its windows. Return the loss at each step."""
    losses = []
    for step in _grouped(pairs, batch):
        windows = sum(len(x) for x, _ in step)
        whole = torch.zeros(())
        for x, target in step:
            part = loss_of(x, target) * (len(x) / windows)
            part.backward()
            whole = whole + part.detach()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        schedule.step()
        losses.append(whole)
    return [float(loss) for loss in torch.stack(losses)]  # only now: an accelerator would be waited for at each


def _require_finite(block: nn.Module, losses: Sequence[float], what: str, advice: str) -> None:
    """Raise RunError with the first step whose loss is not finite, and the first parameter that is not either."""
    step = next((i for i, loss in enumerate(losses, 1) if not math.isfinite(loss)), None)
    if step is None:
        return
    damaged = next((name for name, p in block.named_parameters() if not p.isfinite().all()), None)
    where = f", {damaged} is not finite by now" if damaged else ""
    raise RunError(f"{what}: the loss is not finite at step {step}{where}: {advice}.")


def _grouped(pairs: Iterable[Pair], batch: int) -> Iterator[list[Pair]]:
    group: list[Pair] = []
    for pair in pairs:
        group.append(pair)
        if sum(len(x) for x, _ in group) >= batch:
            yield group
            group = []
    if group:
        yield group


def _steps(pairs: Iterable[Pair], batch: int) -> int:
    return max(math.ceil(sum(len(x) for x, _ in pairs) / batch), 1)


def _adam(
    block: nn.Module, values: Sequence[nn.Parameter], plan: Plan, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    low_rank = [p for layer in block.modules() if isinstance(layer, Packed) for p in (layer.U, layer.V) if p.numel()]
    compressed = {id(p) for p in (*values, *low_rank)}
    rest = [p for p in block.parameters() if id(p) not in compressed and p.numel()]
    groups = [{"params": [*values, *low_rank], "lr": plan.lr}, {"params": rest, "lr": plan.rest_lr}]
    optimiser = torch.optim.Adam([group for group in groups if group["params"]], fused=True)

    def cosine(step: int) -> float:
        return 0.2 + 0.8 * (1 + math.cos(math.pi * min(step / steps, 1))) / 2

    return optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, cosine)


def _copy(block: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in block.state_dict().items()}
