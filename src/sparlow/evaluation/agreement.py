"""How far a model agrees with the dense one: divergence of its predictions, first choices, paired losses.

The predictions of the dense model on a text, a distribution over the vocabulary for each token, are too large to keep.
Kept is the hidden state behind its last block, of which its head makes the same logits again, a few tokens at a time.
"""

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparlow.distributed import ALONE, Processes
from sparlow.model.forward.capture import LOGITS_AT_ONCE, run_head
from sparlow.model.forward.decoder import Decoder
from sparlow.model.forward.stand_ins import Form
from sparlow.report.records import Agreement, Perplexity

PARTS = 8  # of the logits that are in memory: so many of them are looked at one after the other


@dataclass(frozen=True)
class Measured:
    """What was measured of a model on the windows of a text.

    Attributes:
        perplexity: Its own.
        agreement: With the dense model; None where no predictions of that were given.
    """

    perplexity: Perplexity
    agreement: Agreement | None = None


@dataclass(frozen=True)
class Predictions:
    """What a model predicts on the windows of a text.

    Attributes:
        hidden: The states behind its last block, one (windows, seqlen, …) tensor for each batch.
        output: The form of what that block returns, for ``run_head``.
        ids: (1, 1) one of the tokens; (0, 1) in a process that has no windows.
        logits: (1, 1, vocabulary) what the head makes of its state, by which the head is known.
    """

    hidden: Sequence[Tensor]
    output: Form
    ids: Tensor
    logits: Tensor

    @classmethod
    def of(cls, model: PreTrainedModel, output: Form, ids: Sequence[Tensor], hidden: Sequence[Tensor]) -> "Predictions":
        """Return the predictions of ``model``, whose head must be there, from the tokens and states of each batch."""
        first = next((i for i, batch in enumerate(ids) if len(batch)), None)
        if first is None:
            return cls(hidden, output, torch.empty(0, 1, dtype=torch.int64), torch.empty(0))
        one = ids[first][:1, :1]
        return cls(hidden, output, one, run_head(model, output, one, hidden[first][:1, :1]))

    def has_head(self, model: PreTrainedModel) -> bool:
        """Whether the head of ``model`` is the one that makes these predictions of the states."""
        first = next((state for state in self.hidden if len(state)), None) if len(self.ids) else None
        if first is None:
            return True
        logits = run_head(model, self.output, self.ids, first[:1, :1])
        return logits.shape == self.logits.shape and torch.equal(logits, self.logits)


@dataclass(frozen=True)
class Dense:
    """The dense model to compare with, on one text.

    Attributes:
        model: Holds its head; blocks are not run, and may be on the meta device.
        predictions: What it predicts.
    """

    model: PreTrainedModel
    predictions: Predictions

    def logits(self, ids: Tensor, state: Tensor) -> Tensor:
        """Return the logits (b, n, vocabulary) of states (b, n, …) behind the last block."""
        return run_head(self.model, self.predictions.output, ids, state)


def copy_outside(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model with copies of all that is outside of the blocks, and the blocks themselves."""
    return copy.deepcopy(model, {id(block): block for block in Decoder.of(model).blocks})


def beside(losses: Tensor, logits: Tensor, dense: Tensor, after: Tensor) -> Tensor:
    """Return (4, b, n): the losses, and for each token divergence, same first choice, and difference of losses.

    Args:
        losses: (b, n) of ``logits``.
        logits: (b, n, vocabulary) of the model.
        dense: (b, n, vocabulary) of the dense one.
        after: (b, n) the tokens that come next.
    """
    rows = max(LOGITS_AT_ONCE // PARTS // logits.shape[-1], 1)
    wanted = after.to(logits.device).flatten()
    ours, theirs = logits.flatten(0, 1), dense.to(logits.device).flatten(0, 1)
    parts = zip(ours.split(rows), theirs.split(rows), wanted.split(rows), strict=True)
    figures = torch.cat([_figures(*part) for part in parts], 1)
    return torch.cat([losses[None], figures.view(3, *after.shape)])


def _figures(ours: Tensor, dense: Tensor, after: Tensor) -> Tensor:
    """Return divergence, same first choice and difference of losses (3, n) of logits (n, vocabulary)."""
    log_q, log_p = ours.float().log_softmax(-1), dense.float().log_softmax(-1)
    terms = (log_p - log_q).mul_(log_p.exp()).masked_fill_(log_p.isneginf(), 0)  # what is impossible adds nothing
    same = ours.argmax(-1) == dense.argmax(-1)
    difference = (log_p - log_q).gather(1, after[:, None]).squeeze(1)
    return torch.stack([terms.sum(-1), same.float(), difference])


class Figures:
    """Collects what is measured of each window."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []  # (b,) float64
        self._beside: list[Tensor] = []  # (3, b) float64

    def add(self, pieces: Iterable[Tensor]) -> None:
        """Take some windows, (1, b, n) losses or what ``beside`` returns for a range of positions at a time."""
        whole = torch.cat(list(pieces), 2)
        self._losses.append(whole[0].mean(1).double().cpu())
        if len(whole) > 1:
            self._beside.append(whole[1:].cpu().double().mean(2))

    def perplexity(self, processes: Processes = ALONE) -> Perplexity:
        """Return exp of the mean over all windows of all processes, with its standard error."""
        mean, error = _mean_and_error(self._losses, processes)
        # of several processes, which have the windows in an order of their own, nobody knows all
        losses = tuple(torch.cat(self._losses).tolist()) if processes.size == 1 and math.isfinite(mean) else ()
        try:
            value = math.exp(mean)
        except OverflowError:
            return Perplexity(math.inf, losses=losses)
        return Perplexity(value, _finite(value * error), losses)

    def agreement(self, processes: Processes = ALONE) -> Agreement:
        """Return the means over all windows of all processes, with their standard errors."""
        means = [_mean_and_error([part[i] for part in self._beside], processes) for i in range(3)]
        (divergence, error), (same, _), (difference, spread) = ((_finite(m), _finite(e)) for m, e in means)
        return Agreement(divergence, error, same, difference, spread)


def _mean_and_error(values: Sequence[Tensor], processes: Processes) -> tuple[float, float]:
    """Return the mean of one figure a window, and its standard error; NaN of a single window."""
    total, count = processes.totals([sum(part.sum().item() for part in values), sum(len(part) for part in values)])
    mean = total / count
    (spread,) = processes.totals([sum((part - mean).square().sum().item() for part in values)])
    return mean, math.sqrt(spread / (count - 1) / count) if count > 1 else math.nan


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
