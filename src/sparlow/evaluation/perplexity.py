"""Perplexity by one pinned protocol, and named tasks.

The text becomes windows of ``seqlen`` tokens without overlap (``text.evaluation_windows``); the negative log-likelihood
is averaged over the seqlen − 1 predictions of a window, then over windows; perplexity is its exponential. Papers differ
in exactly these choices, so figures compare only at the same text and seqlen.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparlow.distributed import ALONE, Processes
from sparlow.errors import InputError
from sparlow.evaluation.tasks import LoadedTasks, TaskResult, average, load_tasks, measure_tasks
from sparlow.model.forward.attention import unfused_heads, windows_at_once
from sparlow.model.forward.block_pass import BlockPass, pass_through
from sparlow.model.forward.capture import Recording, run_head, tokens_at_once
from sparlow.model.forward.causality import require_causal
from sparlow.model.forward.decoder import Decoder
from sparlow.model.forward.stand_ins import behind_blocks
from sparlow.model.loading.objects import in_eval_mode
from sparlow.model.loading.source import as_tokenizer
from sparlow.model.loading.weights import Weights
from sparlow.own_settings import own_settings
from sparlow.progress import Notify
from sparlow.recipe.run_options import listed
from sparlow.report.records import Perplexity
from sparlow.text import WITH_BOS, beginning, evaluation_windows

LOOKED_AT = 16  # tokens of which is seen whether logits can be taken in pieces
TOLERANCE = 0.01  # of the largest logit: half precision rounds products of other sizes otherwise


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
    heads = unfused_heads(model.config.get_text_config())
    batches = windows.split(windows_at_once(windows.shape[1], heads))
    with in_eval_mode(model):
        few = tokens_at_once(model, len(batches[0])) < windows.shape[1]
        apart = few and _has_head_apart(model, windows[:1, :LOOKED_AT])
        for batch in batches:
            ids = batch.to(model.device)  # (b, seqlen)
            means.append(_mean_losses(_losses_apart(model, ids) if apart else _losses_together(model, ids)))
            advance(len(ids))
    return _perplexity(means, ALONE)


def _losses_together(model: PreTrainedModel, ids: Tensor) -> Iterator[Tensor]:
    """Losses (b, n) of a few positions at a time, from the logits of all."""
    logits = model(ids, use_cache=False).logits  # (b, seqlen, vocabulary)
    pieces = _in_pieces(model, ids, logits)  # as copies of all of them would need several times their memory
    return (_losses(some, after) for _, after, some in pieces)


def _losses_apart(model: PreTrainedModel, ids: Tensor) -> Iterator[Tensor]:
    """Losses (b, n) of a few positions at a time, whose logits alone are there."""
    form, hidden = behind_blocks(model, Decoder.of(model), ids)
    pieces = _in_pieces(model, ids, hidden)
    return (_losses(run_head(model, form, some, state), after) for some, after, state in pieces)


def _has_head_apart(model: PreTrainedModel, window: Tensor) -> bool:
    """Whether logits can be taken of a few tokens at a time, which is tried: of the last half of ``window`` (1, n)."""
    ids, half = window.to(model.device), window.shape[1] // 2
    whole = model(ids, use_cache=False).logits[:, half:].float()
    try:
        form, hidden = behind_blocks(model, Decoder.of(model), ids)
        piece = run_head(model, form, ids[:, half:], hidden[:, half:]).float()
    except InputError:  # no chain of blocks, which is no fault of a model that is only measured
        return False
    return piece.shape == whole.shape and bool((piece - whole).abs().max() <= TOLERANCE * whole.abs().max())


@torch.no_grad()
def perplexity_by_blocks(
    model: PreTrainedModel,
    recording: Recording,
    parts: Weights,
    advance: Callable[[int], None] = lambda _: None,
    processes: Processes = ALONE,
) -> Perplexity:
    """Return the perplexity of a chain of blocks, each of which runs on all windows before the next.

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
    """Yield ids (b, n), the next tokens (b, n) and ``hidden`` (b, n, …) by ranges of positions, to limit the logits."""
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


@own_settings()
def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | str | Path,
    *,
    perplexity_on: str | Sequence[str] = ("builtin",),
    seqlen: int = 2048,
    limit: int | None = None,
    column: str = "text",
    tasks: Sequence[str] | LoadedTasks = (),
    task_path: str | Path | None = None,
    fewshot: int | None = None,
    batch_size: int = 8,
    notify: Notify = lambda _: None,
) -> Evaluation:
    """Measure a model; works on compressed and plain ones alike.

    Args:
        model: Any causal language model of transformers, ours included.
        tokenizer: Its tokenizer, or the directory or hub id it comes from.
        perplexity_on: Corpora or files, see ``sparlow.text``.
        seqlen: Tokens in a window; perplexities of different seqlen do not compare.
        limit: At most so many windows of each corpus, and so many questions of each task.
        column: That holds the text of files and hub data sets.
        tasks: Names known to lm-eval or in ``task_path``, ``paper`` for the eight zero-shot tasks of the paper; or what
            ``sparlow.evaluation.tasks.load_tasks`` returned, to ask several models the same.
        task_path: Directory with task files (.yaml), which go before lm-eval's of the same name.
        fewshot: Examples shown before each question; by default as the task says, else 5 for ``mmlu`` and none for the
            rest.
        batch_size: Sequences in one pass of the model, for tasks.
        notify: Told the progress of tasks.

    Returns:
        ``{"perplexity": {corpus: value}}`` by the published protocol, and, where the tokenizer begins a text with a
        token of its own, also ``"corpus, with BOS"``, for windows that all begin so; with tasks also ``"tasks"``, a
        ``TaskResult`` by name, and ``"average"``, their mean, None where a metric is no share of right answers.

    Raises:
        InputError: Something named here does not exist or cannot be used; lm-eval is missing.
    """
    loaded = tasks if isinstance(tasks, LoadedTasks) else load_tasks(tasks, path=task_path, fewshot=fewshot)
    perplexity_on = listed(perplexity_on)
    tokenizer = require_tokenizer(as_tokenizer(tokenizer), "The model")
    if perplexity_on:
        require_context(model, seqlen)
        with in_eval_mode(model):
            require_causal(model, model.config.name_or_path or type(model).__name__)
    texts = texts_to_measure(perplexity_on, model, tokenizer, seqlen=seqlen, limit=limit, column=column)
    found: Evaluation = {"perplexity": {name: perplexity(model, windows).value for name, windows in texts.items()}}
    if loaded.items:
        found["tasks"] = measure_tasks(model, tokenizer, loaded, limit=limit, batch_size=batch_size, notify=notify)
        found["average"] = average(found["tasks"])
    return found


def texts_to_measure(
    corpora: Sequence[str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seqlen: int,
    limit: int | None,
    column: str,
) -> dict[str, Tensor]:
    """Return the windows (n, seqlen) int64 of each text, by its name: those of the published protocol.

    Where the tokenizer begins a text with a token of its own, windows that all begin so stand beside them.

    Raises:
        InputError: A text cannot be used, or holds tokens that the model does not have.
    """
    begin = beginning(tokenizer, "auto") if corpora else ()
    found = {}
    for name in corpora:
        cut = functools.partial(evaluation_windows, name, tokenizer, seqlen=seqlen, limit=limit, column=column)
        found[name] = require_vocabulary(model, cut(), name)
        if len(begin) < seqlen - 1 and begin:
            found[name + WITH_BOS] = require_vocabulary(model, cut(begin=begin), name)
    return found


def require_vocabulary(model: PreTrainedModel, windows: Tensor, what: str) -> Tensor:
    """Return token ids, of which none may lie outside of the model's embedding; ``what`` holds them.

    Raises:
        InputError: One does, with both numbers.
    """
    embedding: Any = model.get_input_embeddings()
    rows = embedding.weight.shape[0]
    least, most = int(windows.min()), int(windows.max())
    if least < 0 or most >= rows:
        raise InputError(
            f"{what}: token id {least if least < 0 else most} is outside the vocabulary, for the model's embedding has "
            f"{rows} rows. Use the tokenizer that belongs to the model."
        )
    return windows


def require_context(model: PreTrainedModel, seqlen: int, option: str = "seqlen") -> None:
    """Raise InputError if windows of ``seqlen`` tokens, so given by ``option``, are longer than the model reads."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and 0 < context < seqlen:  # some say -1 where nothing bounds it
        raise InputError(f"The model reads at most {context} tokens, and {option} is {seqlen}. Lower --{option}.")


def require_tokenizer(tokenizer: PreTrainedTokenizerBase | None, name: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer, or say what to do without one."""
    if tokenizer is None:
        raise InputError(f"{name} has no tokenizer. Give token windows instead of text, or add the tokenizer's files.")
    return tokenizer
