"""Train the parameters of a compressed block, or of many, by any loss; zeros stay zero, the best epoch is kept."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from sparlow.distributed import ALONE, Processes
from sparlow.errors import RunError
from sparlow.machine import give_back
from sparlow.model.training.packed_layer import packed, trained_parameters
from sparlow.model.training.resume_state import TrainingCheckpoint, TrainingState
from sparlow.model.training.trained_parts import KeptValues, LowRank, OnGrid

BUCKET = 2**26  # bytes of gradients that processes add up at a time
OF_SCALES = 5.0  # times the rate of S is that of a scale, which is relative to what it was

Loss = Callable[[int, Tensor, Tensor], Tensor]  # number, inputs, targets of a micro-batch → mean over its tokens


@dataclass(frozen=True)
class TrainingPlan:
    """The schedule of a training, whatever its objective.

    Attributes:
        epochs: Passes over the text, at most.
        lr: Learning rate of Adam for S, norms and biases; falls along a cosine to a fifth.
        low_rank_lr: Learning rate for U and V, which falls likewise.
        batch: Windows a step.
        patience: Epochs without gain on the held-out windows after which training ends; 0 for never.
    """

    epochs: int
    lr: float
    low_rank_lr: float
    batch: int
    patience: int


@dataclass(frozen=True)
class TrainingResult:
    """What a training did; the losses are means over the held-out windows or, without any, over all windows."""

    loss_before: float
    loss_after: float
    epochs: int
    seconds: float
    losses: list[float] = field(default_factory=list)  # after each epoch


def train(
    block: nn.Module,
    loss_of: Loss,
    data: "MicroBatches",
    plan: TrainingPlan,
    *,
    seed: int,
    label: str,
    advance: Callable[[int], None] = lambda _: None,
    checkpoint: TrainingCheckpoint | None = None,
) -> TrainingResult:
    """Train a block's compressed layers and norms by any loss, in place, and leave it with those of the best epoch.

    Of a block that holds neither, the loss is measured and nothing is trained.

    Args:
        block: What ``loss_of`` runs.
        loss_of: The loss of one micro-batch, from its input and target.
        data: What it is trained on, and judged by.
        plan: The schedule.
        seed: Random seed for the order of the micro-batches.
        label: How errors call the training.
        advance: Called with 1 after every epoch.
        checkpoint: Keeps the state from time to time, and has the one to resume from.

    Raises:
        RunError: The loss is not finite.
    """
    order = torch.Generator().manual_seed(seed)
    with packed(block), torch.enable_grad():
        give_back()  # what was freed before, S among it
        if not trained_parameters(block):
            loss = data.judge(loss_of)
            _require_finite(block, [loss], f"{label} cannot begin")
            return TrainingResult(loss, loss, 0, 0.0)
        training = _Training(block, plan, data, loss_of, checkpoint or TrainingCheckpoint())
        state = training.state
        try:
            _require_finite(block, [state.before], f"{label} cannot begin")
            for epoch in range(1, plan.epochs + 1):
                # drawn also for epochs that are done already
                shuffled = torch.randperm(len(data.training), generator=order).tolist()
                if epoch > state.epochs:
                    if plan.patience and state.waited >= plan.patience:
                        break
                    losses = training.epoch(shuffled)
                    _require_finite(block, losses, f"{label} diverged in epoch {epoch}")
                advance(1)
            training.share()
        finally:
            seconds = training.end()
            give_back()  # what steps have freed, before each layer takes its own room again
    return TrainingResult(state.before, state.best, state.epochs, seconds, state.losses)


class MicroBatches:
    """Micro-batches with their targets, read when their turn comes; of several processes each has a part of every one.

    Args:
        inputs: (b, seqlen, d) each, what this process has, on any device.
        targets: (b, seqlen, d) each, likewise.
        held_out: So many micro-batches at the end are not trained on, but decide which epoch was best.
        processes: Those that share them; their gradients are added up.

    Attributes:
        training: Numbers of the micro-batches that are trained on.
        judging: Numbers of those that judge: the ones held out or, without any, all.
    """

    def __init__(
        self, inputs: Sequence[Tensor], targets: Sequence[Tensor], held_out: int = 0, processes: Processes = ALONE
    ) -> None:
        self._inputs, self._targets, self.processes = inputs, targets, processes
        self._windows = processes.totals([len(x) for x in inputs])  # of all processes together
        self.training = range(len(inputs) - held_out)
        self.judging = range(len(inputs) - held_out, len(inputs)) if held_out else self.training

    def steps(self, chosen: Iterable[int], batch: int) -> Iterator[list[int]]:
        """Group the chosen micro-batches, so that each group has the windows of a step."""
        group: list[int] = []
        for i in chosen:
            group.append(i)
            if self.windows(group) >= batch:
                yield group
                group = []
        if group:
            yield group

    def windows(self, chosen: Iterable[int]) -> float:
        """How many windows all processes have there."""
        return sum(self._windows[i] for i in chosen)

    def own(self, chosen: Iterable[int]) -> Iterator[tuple[int, Tensor, Tensor]]:
        """What this process has of them: their numbers, inputs and targets."""
        found = ((i, self._inputs[i], self._targets[i]) for i in chosen)
        return ((i, x, target) for i, x, target in found if len(x))

    def judge(self, loss_of: Loss) -> float:
        """Mean of the loss over all windows that judge."""
        return self.mean(loss_of, self.judging)

    @torch.no_grad()
    def mean(self, loss_of: Loss, chosen: Iterable[int]) -> float:
        """Mean of the loss over the windows of the chosen micro-batches, of all processes."""
        chosen, total = list(chosen), torch.zeros(())
        for i, x, target in self.own(chosen):
            total = total + loss_of(i, x, target) * len(x)
        return self.processes.totals([float(total)])[0] / self.windows(chosen)

    def added_up(self, losses: Sequence[Tensor]) -> list[float]:
        """Of each of these sums the part that this process has → the whole."""
        return self.processes.totals(torch.stack(list(losses)).tolist()) if losses else []

    def add_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Give every process the sum of all gradients; a parameter that none has a gradient of stays without."""
        if self.processes.size == 1:
            return
        having = self.processes.totals([p.grad is not None for p in parameters])
        for p in (p for p, count in zip(parameters, having, strict=True) if not count):
            p.grad = None
        for bucket in _buckets([p for p, count in zip(parameters, having, strict=True) if count]):
            parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            flat = [part.flatten().float() for part in parts]
            summed = self.processes.all_reduce(flat[0] if len(flat) == 1 else torch.cat(flat))
            for p, own in zip(bucket, summed.split([p.numel() for p in bucket]), strict=True):
                p.grad = own.view_as(p).to(p.dtype)


def _buckets(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Group parameters whose gradients are sent together, so that small ones are not sent one by one."""
    group: list[Tensor] = []
    size = 0
    for p in parameters:
        own = p.numel() * torch.float32.itemsize
        if group and size + own > BUCKET:
            yield group
            group, size = [], 0
        group.append(p)
        size += own
    if group:
        yield group


class _Training:
    """One training under way; its state can be kept, and resumed from."""

    def __init__(
        self,
        block: nn.Module,
        plan: TrainingPlan,
        data: MicroBatches,
        loss_of: Loss,
        checkpoint: TrainingCheckpoint,
    ) -> None:
        self._start = time.perf_counter()
        self._plan, self._data, self._loss_of, self._checkpoint = plan, data, loss_of, checkpoint
        self._optimiser = _adam(block, plan)
        self._rates = [group["lr"] for group in self._optimiser.param_groups]
        self._trained: dict[str, Tensor] = {n: p for n, p in block.named_parameters() if p.requires_grad}
        found = checkpoint.resume(self._trained, self._optimiser)
        if found is None:
            before = data.judge(loss_of)
            found = TrainingState(before, before), {name: p.detach().clone() for name, p in self._trained.items()}
        self.state, self._best = found

    def epoch(self, shuffled: Sequence[int]) -> list[float]:
        """The steps of an epoch that are left, and the judgement; return the loss at each, and that."""
        state, losses = self.state, []
        steps = list(self._data.steps(shuffled, self._plan.batch))
        state.divide(len(steps))
        for step in steps[state.steps :]:
            losses.append(self._step(step, state.updates / (self._plan.epochs * len(steps))))
            state.steps, state.updates = state.steps + 1, state.updates + 1
            self._keep()
        loss = self._data.judge(self._loss_of)
        state.epochs, state.steps = state.epochs + 1, 0
        state.losses.append(loss)
        state.waited = 0 if loss < state.best else state.waited + 1
        if loss < state.best:
            state.best = loss
            self._copy(self._trained, self._best)
        return [*self._data.added_up(losses), loss]  # only now: an accelerator would be waited for at each

    def seconds(self) -> float:
        """Taken so far, those before a state that was resumed from included."""
        return self.state.seconds + time.perf_counter() - self._start

    def share(self) -> None:
        """Give every process the same bits of the best parameters, whatever their machines."""
        for p in self._best.values():
            self._data.processes.broadcast(p)

    def end(self) -> float:
        """Put the parameters of the best epoch in place, and let all else go; return the seconds taken."""
        self._copy(self._best, self._trained)
        seconds = self.seconds()
        self._optimiser.state.clear()
        self._optimiser.param_groups.clear()
        self._trained, self._best = {}, {}
        return seconds

    @staticmethod
    @torch.no_grad()
    def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
        for name, p in source.items():
            target[name].copy_(p)

    def _keep(self) -> None:
        """Keep the state from time to time. All processes do so at once, since all wait for the one that writes."""
        processes = self._data.processes
        if not self._checkpoint.keeps or not any(processes.totals([self._checkpoint.is_due()])):
            return
        processes.part()
        now = replace(self.state, seconds=self.seconds())
        self._checkpoint.keep(now, self._trained, self._optimiser, self._best)

    def _step(self, step: Sequence[int], done: float) -> Tensor:
        """Take one step along the gradients of some micro-batches, ``done`` of all steps behind it; return the loss."""
        falling = 0.2 + 0.8 * (1 + math.cos(math.pi * min(done, 1))) / 2
        for group, rate in zip(self._optimiser.param_groups, self._rates, strict=True):
            group["lr"] = rate * falling
        parameters = [p for group in self._optimiser.param_groups for p in group["params"]]
        windows = self._data.windows(step)
        whole = torch.zeros((), device=parameters[0].device)
        for i, x, target in self._data.own(step):
            part = self._loss_of(i, x, target) * (len(x) / windows)
            part.backward()
            whole = whole + part.detach()
        self._data.add_gradients(parameters)
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        return whole


def _require_finite(block: nn.Module, losses: Sequence[float], what: str) -> None:
    """Raise RunError with the first step whose loss is not finite, and the first parameter that is not either."""
    step = next((i for i, loss in enumerate(losses, 1) if not math.isfinite(loss)), None)
    if step is None:
        return
    damaged = next((name for name, p in block.named_parameters() if not p.isfinite().all()), None)
    where = f", {damaged} is not finite by now" if damaged else ""
    raise RunError(f"{what}: the loss is not finite at step {step}{where}. Lower --match-lr.")


def _adam(block: nn.Module, plan: TrainingPlan) -> torch.optim.Optimizer:
    parts = list(block.modules())
    values = [part.values for part in parts if isinstance(part, KeptValues) and part.values.numel()]
    ratios = [part.ratio for part in parts if isinstance(part, OnGrid) and part.ratio.numel()]
    low_rank = [p for part in parts if isinstance(part, LowRank) for p in (part.U, part.V) if p.numel()]
    known = {id(p) for p in (*values, *ratios, *low_rank)}
    rest = [p for p in trained_parameters(block) if id(p) not in known]
    groups = ((values, plan.lr), (low_rank, plan.low_rank_lr), (rest, plan.lr), (ratios, plan.lr * OF_SCALES))
    return torch.optim.Adam([{"params": some, "lr": lr} for some, lr in groups if some], fused=True)
