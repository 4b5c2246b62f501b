"""Train the parameters of a compressed block, or of many, by any loss; zeros stay zero, the best epoch is kept."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sparlow.distributed import ALONE, Processes
from sparlow.errors import RunError
from sparlow.model.training.packed_layer import Packed, packed
from sparlow.model.training.resume_state import TrainingCheckpoint, TrainingState

Loss = Callable[[int, Tensor, Tensor], Tensor]  # number, inputs, targets of a micro-batch → mean over its tokens


@dataclass(frozen=True)
class Plan:
    """How compressed layers are trained.

    Attributes:
        epochs: At most.
        lr: Of Adam for S; falls along a cosine to a fifth.
        batch: Windows a step.
        relative: Measure each token's error against its own size instead of all tokens' together.
        patience: Epochs without gain on the held-out windows after which training ends; 0 for never.
        dense_targets: The targets come from the dense model throughout (x from its own blocks before), not from the
            dense block fed by the compressed blocks before.
        low_rank: So many times ``lr`` for U and V.
        rest: So many times ``lr`` for norms, biases and layers that stayed dense.
        together: All blocks are trained together towards the dense model's logits, not each towards its own outputs.
    """

    epochs: int
    lr: float
    batch: int
    relative: bool
    patience: int
    dense_targets: bool = False
    low_rank: float = 1.0
    rest: float = 1.0
    together: bool = False


@dataclass(frozen=True)
class TrainingResult:
    """What matching did; losses are relative to the size of the targets, on the held-out windows if there are any."""

    loss_before: float
    loss_after: float
    epochs: int
    seconds: float


def train(
    block: nn.Module,
    loss_of: Loss,
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    plan: Plan,
    *,
    held_out: int,
    seed: int,
    label: str,
    advice: str,
    advance: Callable[[int], None] = lambda _: None,
    processes: Processes = ALONE,
    midway: TrainingCheckpoint | None = None,
) -> TrainingResult:
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
        processes: As of ``match``.
        midway: Keeps the state from time to time, and has the one to go on from.
    """
    midway = midway or TrainingCheckpoint()
    parted = len(inputs) - held_out
    data = MicroBatches(inputs, targets, processes)
    judge = range(parted, len(inputs)) if held_out else range(parted)
    order = torch.Generator().manual_seed(seed)
    with packed(block) as values, torch.enable_grad():
        training = _Training(block, _adam(block, values, plan), plan, data, loss_of, judge, midway)
        stand = training.stand
        _require_finite(block, [stand.before], f"{label} cannot begin", advice)
        for epoch in range(1, plan.epochs + 1):
            shuffled = torch.randperm(parted, generator=order).tolist()  # drawn also for epochs that are done already
            if epoch > stand.epochs:
                if plan.patience and stand.waited >= plan.patience:
                    break
                losses = training.epoch(shuffled)
                _require_finite(block, losses, f"{label} diverged in epoch {epoch}", advice)
            advance(1)
        block.load_state_dict(training.best)
    for p in block.parameters():
        processes.broadcast(p.data)  # the same bits everywhere, whatever the machines
    return TrainingResult(stand.before, stand.best, stand.epochs, training.seconds())


class MicroBatches:
    """Micro-batches with their targets, read when their turn comes; of several processes each has a part of every one.

    Args:
        inputs: (b, seqlen, d) each, what this process has.
        targets: Likewise.
        processes: Those that share them.
    """

    def __init__(self, inputs: Sequence[Tensor], targets: Sequence[Tensor], processes: Processes) -> None:
        self._inputs, self._targets, self._processes = inputs, targets, processes
        self._windows = processes.totals([len(x) for x in inputs])  # of all processes together

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

    @torch.no_grad()
    def judged(self, loss_of: Loss, chosen: Sequence[int]) -> float:
        """Mean of the loss over all windows there."""
        total = torch.zeros(())
        for i, x, target in self.own(chosen):
            total = total + loss_of(i, x, target) * len(x)
        return self._processes.totals([float(total)])[0] / self.windows(chosen)

    def added_up(self, losses: Sequence[Tensor]) -> list[float]:
        """Of each of these sums the part that this process has → the whole."""
        return self._processes.totals(torch.stack(list(losses)).tolist()) if losses else []

    def add_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Give every process the sum of all gradients; a parameter that none has a gradient of stays without."""
        if self._processes.size == 1:
            return
        having = [
            torch.zeros(1, device=p.device) if p.grad is None else torch.ones(1, device=p.device) for p in parameters
        ]
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = self._processes.all_reduce(torch.cat([part.flatten().float() for part in (*parts, *having)]))
        *sums, counts = flat.split([*(p.numel() for p in parameters), len(parameters)])
        for p, summed, count in zip(parameters, sums, counts.tolist(), strict=True):
            p.grad = summed.view_as(p).to(p.dtype) if count else None


class _Training:
    """One block on its way; what it depends on can be kept and gone on from."""

    def __init__(
        self,
        block: nn.Module,
        optimiser: torch.optim.Optimizer,
        plan: Plan,
        data: MicroBatches,
        loss_of: Loss,
        judge: Sequence[int],
        midway: TrainingCheckpoint,
    ) -> None:
        self._start = time.perf_counter()
        self._block, self._optimiser, self._plan, self._data = block, optimiser, plan, data
        self._loss_of, self._judge, self._midway = loss_of, judge, midway
        self._rates = [group["lr"] for group in optimiser.param_groups]
        found = midway.resume(block, optimiser)
        if found is None:
            before = data.judged(loss_of, judge)
            found = TrainingState(before, before), _copy(block)
        self.stand, self.best = found

    def epoch(self, shuffled: Sequence[int]) -> list[float]:
        """The steps of an epoch that are left, and the judgement; return the loss at each, and that."""
        stand, losses = self.stand, []
        steps = list(self._data.steps(shuffled, self._plan.batch))
        for step in steps[stand.steps :]:
            losses.append(self._step(step, stand.updates / (self._plan.epochs * len(steps))))
            stand.steps, stand.updates = stand.steps + 1, stand.updates + 1
            self._keep()
        loss = self._data.judged(self._loss_of, self._judge)
        stand.epochs, stand.steps = stand.epochs + 1, 0
        stand.waited = 0 if loss < stand.best else stand.waited + 1
        if loss < stand.best:
            stand.best, self.best = loss, _copy(self._block)
        return [*self._data.added_up(losses), loss]  # only now: an accelerator would be waited for at each

    def seconds(self) -> float:
        """Taken so far, those before a state that was gone on from included."""
        return self.stand.seconds + time.perf_counter() - self._start

    def _keep(self) -> None:
        self._midway.keep(replace(self.stand, seconds=self.seconds()), self._block, self._optimiser, self.best)

    def _step(self, step: Sequence[int], done: float) -> Tensor:
        """Add up gradients of micro-batches and go on by them, with such a part of all steps done; return the loss."""
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


def _require_finite(block: nn.Module, losses: Sequence[float], what: str, advice: str) -> None:
    """Raise RunError with the first step whose loss is not finite, and the first parameter that is not either."""
    step = next((i for i, loss in enumerate(losses, 1) if not math.isfinite(loss)), None)
    if step is None:
        return
    damaged = next((name for name, p in block.named_parameters() if not p.isfinite().all()), None)
    where = f", {damaged} is not finite by now" if damaged else ""
    raise RunError(f"{what}: the loss is not finite at step {step}{where}: {advice}.")


def _adam(block: nn.Module, values: Sequence[nn.Parameter], plan: Plan) -> torch.optim.Optimizer:
    low_rank = [p for layer in block.modules() if isinstance(layer, Packed) for p in (layer.U, layer.V) if p.numel()]
    compressed = {id(p) for p in (*values, *low_rank)}
    rest = [p for p in block.parameters() if id(p) not in compressed and p.numel()]
    groups = ((list(values), plan.lr), (low_rank, plan.lr * plan.low_rank), (rest, plan.lr * plan.rest))
    return torch.optim.Adam([{"params": some, "lr": lr} for some, lr in groups if some], fused=True)


def _copy(block: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in block.state_dict().items()}
