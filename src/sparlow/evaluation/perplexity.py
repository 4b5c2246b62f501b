"""Perplexity by one pinned protocol, and named tasks.

The text becomes windows of ``seqlen`` tokens without overlap (``text.evaluation_windows``); the negative log-likelihood
is averaged over the seqlen − 1 predictions of a window, then over windows; perplexity is its exponential. Papers differ
in exactly these choices, so figures compare only at the same text and seqlen.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparlow.distributed import ALONE, Processes
from sparlow.errors import InputError
from sparlow.evaluation.tasks import LoadedTasks, TaskResult, average, load_tasks, measure_tasks
from sparlow.model.forward.block_pass import BlockPass, pass_through
from sparlow.model.forward.capture import Recording, run_head, tokens_at_once
from sparlow.model.loading.objects import in_eval_mode
from sparlow.model.loading.weights import Weights
from sparlow.progress import Notify
from sparlow.report.records import Perplexity
from sparlow.text import evaluation_windows

TOKENS_AT_ONCE = 2048  # that pass through a model or a block at a time


class Evaluation(TypedDict):
    """What ``evaluate`` found: perplexities by corpus, and, when asked for, tasks by name and their mean."""

    perplexity: dict[str, float]
    tasks: NotRequired[dict[str, TaskResult]]
    average: NotRequired[float | None]


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: Tensor, advance: Callable[[int], None] = lambda _: None) -> Perplexity:
    """Perplexity of ``model`` on ``windows`` (n, seqlen) int64; the model is left in the mode it was in.

    Args:
        model: Any causal language model of transformers.
        windows: Token ids.
        advance: Called with the number of windows finished at a time, for a progress bar.
    """
    means = []
    with in_eval_mode(model):
        for batch in windows.split(max(TOKENS_AT_ONCE // windows.shape[1], 1)):
            ids = batch.to(model.device)  # (b, seqlen)
            logits = model(ids, use_cache=False).logits  # (b, seqlen, vocabulary)
            pieces = _in_pieces(model, ids, logits)  # as copies of all of them would need several times their memory
            means.append(_mean_losses(_losses(some, after) for _, after, some in pieces))
            advance(len(ids))
    return _perplexity(means, ALONE)


@torch.no_grad()
def perplexity_by_blocks(
    model: PreTrainedModel,
    recording: Recording,
    parts: Weights,
    advance: Callable[[int], None] = lambda _: None,
    processes: Processes = ALONE,
) -> Perplexity:
    """Perplexity of a chain of blocks, each of which passes over all windows when its turn comes.

    Args:
        model: In eval mode; it may be on the meta device.
        recording: What enters the blocks for the windows to measure on.
        parts: What is measured.
        advance: Called with 1 after each block and at the end.
        processes: Those that each have a part of the recording.
    """
    hidden = recording.hidden
    for i, calls in enumerate(recording.calls):
        with parts.block(i) as block:
            hidden = pass_through(BlockPass(block, calls, hidden))
        advance(1)
    means = []
    with parts.outside_blocks():
        for ids, x in ((ids, x) for ids, x in zip(recording.ids, hidden, strict=True) if len(ids)):
            pieces = _in_pieces(model, ids, x)
            losses = (_losses(run_head(model, recording.output, some, state), after) for some, after, state in pieces)
            means.append(_mean_losses(losses))
    advance(1)
    return _perplexity(means, processes)


def _in_pieces(model: PreTrainedModel, ids: Tensor, hidden: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Cut positions, so that few logits are there at a time: ids (b, n), what follows (b, n), ``hidden`` (b, n, …)."""
    n = tokens_at_once(model, len(ids))
    return zip(ids[:, :-1].split(n, 1), ids[:, 1:].split(n, 1), hidden[:, :-1].split(n, 1), strict=True)


def _losses(logits: Tensor, after: Tensor) -> Tensor:
    """Negative log-likelihood (b, n) of the tokens ``after`` (b, n) by ``logits`` (b, n, vocabulary)."""
    wanted = after.to(logits.device).flatten()
    losses = functional.cross_entropy(logits.flatten(0, 1).float(), wanted, reduction="none")
    return losses.view(after.shape)


def _mean_losses(pieces: Iterable[Tensor]) -> Tensor:
    """Mean over the positions of each window (b,) float64, on the CPU."""
    return torch.cat(list(pieces), 1).mean(1).double().cpu()


def _perplexity(means: Sequence[Tensor], processes: Processes) -> Perplexity:
    """Return exp of the mean over all windows of all processes, with its standard error."""
    sums = [sum(part.sum().item() for part in means), sum(len(part) for part in means)]
    total, count = processes.totals(sums)
    mean = total / count
    (spread,) = processes.totals([sum((part - mean).square().sum().item() for part in means)])
    try:
        value = math.exp(mean)
    except OverflowError:
        return Perplexity(math.inf)
    stderr = value * math.sqrt(spread / (count - 1) / count) if count > 1 else math.nan
    return Perplexity(value, stderr if math.isfinite(stderr) else None)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    perplexity_on: Sequence[str] = ("builtin",),
    seqlen: int = 2048,
    limit: int | None = None,
    tasks: Sequence[str] | LoadedTasks = (),
    task_path: str | Path | None = None,
    fewshot: int | None = None,
    batch_size: int = 8,
    notify: Notify = lambda _: None,
) -> Evaluation:
    """Measure a model; works on compressed and plain ones alike.

    Args:
        model: Any causal language model of transformers, ours included.
        tokenizer: Its tokenizer.
        perplexity_on: Corpora or files, see ``sparlow.text``.
        seqlen: Tokens in a window; perplexities of different seqlen do not compare.
        limit: At most so many windows of each corpus, and so many questions of each task.
        tasks: Names known to lm-eval or in ``task_path``, ``paper`` for the eight zero-shot tasks of the paper; or what
            ``sparlow.evaluation.tasks.load_tasks`` returned, to ask several models the same.
        task_path: Directory with task files (.yaml), which go before lm-eval's of the same name.
        fewshot: Examples shown before each question; by default as the task says, else 5 for ``mmlu`` and none for the
            rest.
        batch_size: Sequences in one pass of the model, for tasks.
        notify: Told the progress of tasks.

    Returns:
        ``{"perplexity": {corpus: value}}``; with tasks also ``"tasks"``, a ``TaskResult`` by name, and ``"average"``,
        their mean, None where a metric is no share of right answers.

    Raises:
        InputError: something named here does not exist or cannot be used; lm-eval is missing.
    """
    loaded = tasks if isinstance(tasks, LoadedTasks) else load_tasks(tasks, path=task_path, fewshot=fewshot)
    if perplexity_on:
        require_context(model, seqlen)
    found: Evaluation = {"perplexity": {}}
    for name in perplexity_on:
        windows = evaluation_windows(name, tokenizer, seqlen=seqlen, limit=limit)
        found["perplexity"][name] = perplexity(model, windows).value
    if loaded.items:
        found["tasks"] = measure_tasks(model, tokenizer, loaded, limit=limit, batch_size=batch_size, notify=notify)
        found["average"] = average(found["tasks"])
    return found


def require_context(model: PreTrainedModel, seqlen: int, option: str = "seqlen") -> None:
    """Raise InputError if windows of ``seqlen`` tokens, so given by ``option``, are longer than the model reads."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and seqlen > context:
        raise InputError(f"The model reads at most {context} tokens, and {option} is {seqlen}. Lower --{option}.")


def require_tokenizer(tokenizer: PreTrainedTokenizerBase | None, name: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer, or say what to do without one."""
    if tokenizer is None:
        raise InputError(f"{name} has no tokenizer. Give token windows instead of text, or add the tokenizer's files.")
    return tokenizer
