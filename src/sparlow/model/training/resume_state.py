"""Where a training stands, in tensors from which a run that was killed goes on to the same bits."""

import time
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

EVERY = 300.0  # seconds between one state that is kept and the next
PER_EPOCH = "per_epoch"  # a tensor of its own, so that older states can be read


@dataclass
class TrainingState:
    """What counts while a training goes on.

    Attributes:
        before: The loss before the first step.
        best: The lowest so far.
        epochs: Finished.
        steps: Done of the next one.
        updates: Steps of all epochs together.
        waited: Epochs since the best.
        seconds: Taken so far.
        per_epoch: Steps that an epoch has; 0 where that is not known, as of a state that an older version kept.
        losses: After each of the epochs; fewer where an older version kept a state.
    """

    before: float
    best: float
    epochs: int = 0
    steps: int = 0
    updates: int = 0
    waited: int = 0
    seconds: float = 0.0
    per_epoch: int = 0
    losses: list[float] = field(default_factory=list)

    def divide(self, steps: int) -> None:
        """Go on at the same part of an epoch that has so many steps: other processes may take wider ones."""
        if self.per_epoch not in (0, steps):
            self.steps = round(self.steps * steps / self.per_epoch)
            self.updates = self.epochs * steps + self.steps
        self.per_epoch = steps


class TrainingCheckpoint:
    """Keeps the state of one training from time to time.

    Args:
        found: The file of an earlier state of the same training.
        keep: Writes tensors to where ``found`` will be; nothing is kept without it.
    """

    def __init__(self, found: Path | None = None, keep: Callable[[Mapping[str, Tensor]], None] | None = None) -> None:
        self._found, self._keep, self._kept_at = found, keep, time.monotonic()

    @property
    def keeps(self) -> bool:
        """Whether states are kept at all."""
        return self._keep is not None

    def is_due(self) -> bool:
        """Whether the last time is long enough ago."""
        return time.monotonic() - self._kept_at >= EVERY

    def keep(
        self,
        stand: TrainingState,
        trained: Mapping[str, Tensor],
        optimiser: torch.optim.Optimizer,
        best: Mapping[str, Tensor],
    ) -> None:
        """Keep everything that the steps to come depend on.

        Args:
            stand: Numbers.
            trained: The parameters now.
            optimiser: Its state is tensors.
            best: The parameters that the best epoch left.
        """
        if self._keep is None:
            return
        *counts, per_epoch, losses = astuple(stand)
        numbers = torch.tensor([*counts, *losses], dtype=torch.float64)
        moments = {f"{i}.{name}": t for i, part in optimiser.state_dict()["state"].items() for name, t in part.items()}
        parts = {"now": trained, "best": best, "adam": moments}
        named = {f"{part}.{name}": t for part, tensors in parts.items() for name, t in tensors.items()}
        self._keep({"stand": numbers, PER_EPOCH: torch.tensor(per_epoch), **named})
        self._kept_at = time.monotonic()

    @torch.no_grad()
    def resume(
        self, trained: Mapping[str, Tensor], optimiser: torch.optim.Optimizer
    ) -> tuple[TrainingState, dict[str, Tensor]] | None:
        """Bring parameters and optimiser to the state that was found; return its numbers and best parameters.

        A state of other parameters, as another release may have kept it, is left alone.
        """
        if self._found is None:
            return None
        state: dict[int, dict[str, Tensor]] = {}
        best: dict[str, Tensor] = {}
        with safe_open(self._found, "pt") as file:
            keys = list(file.keys())
            if {key.removeprefix("now.") for key in keys if key.startswith("now.")} != trained.keys():
                return None
            stand = _stand(file.get_tensor("stand"), int(file.get_tensor(PER_EPOCH)) if PER_EPOCH in keys else 0)
            for key in keys:
                part, _, name = key.partition(".")
                if part == "now":
                    trained[name].copy_(file.get_tensor(key))
                elif part == "best":
                    best[name] = file.get_tensor(key).to(trained[name].device)
                elif part == "adam":
                    i, _, kind = name.partition(".")
                    state.setdefault(int(i), {})[kind] = file.get_tensor(key)
        optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
        return stand, best


def _stand(numbers: Tensor, per_epoch: int) -> TrainingState:
    before, best, epochs, steps, updates, waited, seconds, *losses = numbers.tolist()
    return TrainingState(before, best, int(epochs), int(steps), int(updates), int(waited), seconds, per_epoch, losses)
