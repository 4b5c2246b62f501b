"""Perplexity by one pinned protocol, and named tasks.

The text becomes windows of ``seqlen`` tokens without overlap (``text.evaluation_windows``); the negative log-likelihood
is averaged over the seqlen − 1 predictions of a window, then over windows; perplexity is its exponential. Papers differ
in exactly these choices, so figures compare only at the same text and seqlen.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import repeat
from pathlib import Path
from typing import NotRequired, TypedDict

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparlow.errors import InputError
from sparlow.evaluation.agreement import Dense, Figures, Measured, Predictions, beside
from sparlow.evaluation.tasks import LoadedTasks, TaskResult, average, load_tasks, measure_tasks
from sparlow.evaluation.texts import require_context, require_tokenizer, texts_to_measure
from sparlow.machine import pick_device
from sparlow.model.forward.activation_store import ActivationStore
from sparlow.model.forward.attention import unfused_heads, windows_at_once
from sparlow.model.forward.block_pass import BlockPass, pass_through
from sparlow.model.forward.capture import Recording, run_head, tokens_at_once
from sparlow.model.forward.causality import require_causal
from sparlow.model.forward.decoder import Decoder
from sparlow.model.forward.stand_ins import Form, behind_blocks
from sparlow.model.loading.objects import in_eval_mode, require_as_it_is
from sparlow.model.loading.source import as_tokenizer, open_model, upcast_for_cpu
from sparlow.model.loading.weights import Weights
from sparlow.own_settings import own_settings
from sparlow.progress import Notify, counting
from sparlow.progress.live import watched
from sparlow.recipe.run_options import listed
from sparlow.report.records import Agreement, Perplexity
from sparlow.text import fingerprint as text_fingerprint

LOOKED_AT = 16  # tokens of which is seen whether logits can be taken in pieces
TOLERANCE = 0.01  # of the largest logit: half precision rounds products of other sizes otherwise


class Evaluation(TypedDict):
    """What ``evaluate`` found.

    Perplexities by corpus with their standard errors, and, when asked for, agreement, tasks by name and their mean.
    """

    perplexity: dict[str, float]
    perplexity_stderr: dict[str, float | None]
    agreement: NotRequired[dict[str, Agreement | None]]
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
    return measure(model, windows, advance)[0].perplexity


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    windows: Tensor,
    advance: Callable[[int], None] = lambda _: None,
    *,
    dense: Dense | None = None,
    keep: bool = False,
) -> tuple[Measured, Predictions | None]:
    """Measure perplexity and agreement of ``model`` on ``windows`` (n, seqlen) int64, and return its predictions too.

    Args:
        model: Any causal language model of transformers, left in the mode it was in.
        windows: Token ids.
        advance: Called with the number of windows finished at a time, for a progress bar.
        dense: What it shall agree with. No agreement is found where the two have not the same vocabulary, or the head
            of ``model`` cannot be run apart from its blocks.
        keep: Whether predictions are wanted. There are none where the head cannot be run apart.
    """
    found, states = Figures(), ActivationStore("cpu")
    heads = unfused_heads(model.config.get_text_config())
    batches = windows.split(windows_at_once(windows.shape[1], heads))
    with in_eval_mode(model), in_eval_mode(dense.model) if dense else nullcontext():
        apart = keep or dense is not None or tokens_at_once(model, len(batches[0])) < windows.shape[1]
        width = _width_of_head(model, windows[:1, :LOOKED_AT]) if apart else None
        if dense and width != dense.predictions.logits.shape[-1]:
            dense = None
        form = None
        for i, batch in enumerate(batches):
            ids = batch.to(model.device)  # (b, seqlen)
            if width is None:
                found.add([_losses_together(model, ids)[None]])
            else:
                form, hidden = behind_blocks(model, Decoder.of(model), ids)
                found.add(_at_head(model, form, ids, hidden, dense, i))
                if keep:
                    states.append(hidden)
            advance(len(ids))
        kept = Predictions.of(model, form, batches, states) if keep and form else None
    return Measured(found.perplexity(), found.agreement() if dense else None), kept


def _losses_together(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Losses (b, n), where the logits of a window can only be had together: of as few windows at a time as need be."""
    windows = tokens_at_once(model, ids.shape[1])  # so many tokens at one place
    return torch.cat([_losses_of_whole(model, some) for some in ids.split(windows)])


def _losses_of_whole(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Losses (b, n) from logits of all positions, looked at a few at a time: copies would take more memory."""
    logits = model(ids, use_cache=False).logits  # (b, seqlen, vocabulary)
    return torch.cat([_losses(some, after) for _, after, some in _in_pieces(model, ids, logits)], 1)


def _at_head(
    model: PreTrainedModel, form: Form, ids: Tensor, hidden: Tensor, dense: Dense | None, number: int
) -> Iterator[Tensor]:
    """Figures (1 or 4, b, n) of a few positions at a time, whose logits alone are there.

    Args:
        model: Its head.
        form: Of what its blocks return.
        ids: (b, seqlen).
        hidden: (b, seqlen, …) behind the last block.
        dense: What it shall agree with, if anything.
        number: Of this batch among the dense model's predictions.
    """

    def figures(some: Tensor, after: Tensor, state: Tensor, true_state: Tensor | None) -> Tensor:
        logits = run_head(model, form, some, state)
        losses = _losses(logits, after)
        if dense is None or true_state is None:
            return losses[None]
        return beside(losses, logits, dense.logits(some, true_state), after)

    truths: Iterable[Tensor | None] = repeat(None)
    if dense is not None:
        truths = dense.predictions.hidden[number][:, :-1].split(tokens_at_once(model, len(ids)), 1)
    for (some, after, state), true_state in zip(_in_pieces(model, ids, hidden), truths, strict=False):
        yield figures(some, after, state, true_state)


def _width_of_head(model: PreTrainedModel, window: Tensor) -> int | None:
    """Return how many logits a head has that can be run apart; None if it cannot.

    That is tried: on the last half of ``window`` (1, n).
    """
    ids, half = window.to(model.device), window.shape[1] // 2
    whole = model(ids, use_cache=False).logits[:, half:].float()
    try:
        form, hidden = behind_blocks(model, Decoder.of(model), ids)
        piece = run_head(model, form, ids[:, half:], hidden[:, half:]).float()
    except InputError:  # no chain of blocks, which is no fault of a model that is only measured
        return None
    if piece.shape != whole.shape:
        return None
    difference = (piece - whole).masked_fill_(piece == whole, 0).abs().max()  # infinite ones may be the same, too
    largest = whole.nan_to_num(0, 0, 0).abs().max()
    return piece.shape[-1] if bool(difference <= TOLERANCE * largest) else None


def behind_all(recording: Recording, parts: Weights, advance: Callable[[int], None]) -> ActivationStore:
    """Run the blocks one after the other, each on all windows; return what leaves the last."""
    hidden = recording.hidden
    for i, calls in enumerate(recording.calls):
        with parts.block(i) as block:
            hidden = pass_through(BlockPass(block, calls, hidden))
        advance(1)
    return hidden


def figures_of(
    model: PreTrainedModel, recording: Recording, hidden: Sequence[Tensor], dense: Dense | None = None
) -> Figures:
    """Return the figures of this process's windows from the states behind the last block.

    Args:
        model: Its head must be there.
        recording: Of the windows.
        hidden: (windows, seqlen, …) for each micro-batch.
        dense: What the model shall agree with, if anything, with predictions of the same micro-batches.
    """
    found = Figures()
    for i, (ids, x) in enumerate(zip(recording.ids, hidden, strict=True)):
        if len(ids):
            found.add(_at_head(model, recording.output, ids, x, dense, i))
    return found


def _in_pieces(model: PreTrainedModel, ids: Tensor, hidden: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield ids (b, n), the next tokens (b, n) and ``hidden`` (b, n, …) by ranges of positions, to limit the logits."""
    n = tokens_at_once(model, len(ids))
    return zip(ids[:, :-1].split(n, 1), ids[:, 1:].split(n, 1), hidden[:, :-1].split(n, 1), strict=True)


def _losses(logits: Tensor, after: Tensor) -> Tensor:
    """Negative log-likelihood (b, n) of the tokens ``after`` (b, n) by ``logits`` (b, n, vocabulary)."""
    wanted = after.to(logits.device).flatten()
    losses = functional.cross_entropy(logits.flatten(0, 1).float(), wanted, reduction="none")
    return losses.view(after.shape)


class Baseline:
    """A dense model to compare others with. Its predictions are kept, so that not all of it need stay in memory.

    Args:
        model: It, open.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._kept: dict[str, Predictions | None] = {}  # by fingerprint of the windows
        self._whole = True

    def measure(self, windows: Tensor, advance: Callable[[int], None] = lambda _: None) -> Perplexity:
        """Measure perplexity on windows (n, seqlen), and keep the predictions; ``advance`` as of ``measure``."""
        found, self._kept[text_fingerprint(windows)] = measure(self.model, windows, advance, keep=True)
        return found.perplexity

    def on(self, windows: Tensor) -> Dense | None:
        """Return what to compare with on windows (n, seqlen); None where there are no predictions, and can be none."""
        text = text_fingerprint(windows)
        if text not in self._kept and self._whole:
            self.measure(windows)
        predictions = self._kept.get(text)
        return Dense(self.model, predictions) if predictions else None

    def release_blocks(self) -> bool:
        """Free the weights of the blocks; return whether any predictions were kept, which are all there is from now."""
        kept = any(self._kept.values())
        if kept:
            Decoder.of(self.model).blocks.to_empty(device="meta")
        self._whole = False
        return kept


def _beside_baseline(
    model: PreTrainedModel, windows: Tensor, dense: Baseline | None, advance: Callable[[int], None]
) -> Measured:
    """Measure a model beside a baseline, if there is one; if that is the model itself, keep its predictions."""
    if dense is not None and dense.model is model:
        return Measured(dense.measure(windows, advance))
    return measure(model, windows, advance, dense=dense.on(windows) if dense else None)[0]


@own_settings()
def evaluate(
    model: PreTrainedModel | str | Path,
    tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
    *,
    evaluate: str | Sequence[str] = ("builtin",),
    seqlen: int = 2048,
    limit: int | None = None,
    column: str = "text",
    tasks: Sequence[str] | LoadedTasks = (),
    task_path: str | Path | None = None,
    fewshot: int | None = None,
    batch_size: int = 8,
    baseline: PreTrainedModel | Baseline | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    notify: Notify | None = None,
) -> Evaluation:
    """Measure a model; works on compressed and plain ones alike.

    Args:
        model: Any causal language model of transformers, ours included, which is given back in the mode it was in; or a
            directory, a hub id or a .gguf file.
        tokenizer: Its tokenizer, or the directory or hub id it comes from; what is named brings its own.
        evaluate: Corpora or files, see ``sparlow.text``.
        seqlen: Tokens in a window; perplexities of different seqlen do not compare.
        limit: At most so many windows of each corpus, and so many questions of each task.
        column: That holds the text of files and hub data sets.
        tasks: Names known to lm-eval or in ``task_path``, ``paper`` for the eight zero-shot tasks of the paper; or what
            ``sparlow.evaluation.tasks.load_tasks`` returned, to ask several models the same.
        task_path: Directory with task files (.yaml), which go before lm-eval's of the same name.
        fewshot: Examples shown before each question; by default as the task says, else 5 for ``mmlu`` and none for the
            rest.
        batch_size: Sequences in one pass of the model, for tasks.
        baseline: The dense model to compare the predictions with; or what is left of one, see ``Baseline``, which may
            also be that of ``model`` itself, to keep its predictions.
        device: Of a model that is named: "auto" (an accelerator if there is one), or torch's name of a device.
        dtype: Of a model that is named: "auto" (as stored), "float32", "bfloat16" or "float16".
        trust_remote_code: Let a model that is named bring Python code of its own.
        notify: Called after every step; if left out, the run shows itself on a terminal and in a notebook.

    Returns:
        ``{"perplexity": {corpus: value}, "perplexity_stderr": {corpus: error}}`` by the published protocol, and, where
        the tokenizer begins a text with a token of its own, also ``"corpus, with BOS"``, for windows that all begin so;
        the standard error is over windows, None for a single one; with a baseline also
        ``"agreement"``, by corpus, None where the two models cannot be compared; with tasks also ``"tasks"``, a
        ``TaskResult`` by name, and ``"average"``, their mean, None where a metric is no share of right answers.

    Raises:
        InputError: Something named here does not exist or cannot be used; lm-eval is missing.
    """
    loaded = tasks if isinstance(tasks, LoadedTasks) else load_tasks(tasks, path=task_path, fewshot=fewshot)
    evaluate = listed(evaluate)
    name = "The model"
    if isinstance(model, str | Path):
        name = str(model)
        opened = open_model(name, dtype=dtype, device=pick_device(device), trust_remote_code=trust_remote_code)
        model, tokenizer = upcast_for_cpu(opened.model), tokenizer or opened.tokenizer
    else:
        require_as_it_is(model, dtype, device)
    tokenizer = require_tokenizer(as_tokenizer(tokenizer), name)
    if evaluate:
        require_context(model, seqlen)
        with in_eval_mode(model):
            require_causal(model, model.config.name_or_path or type(model).__name__)
    texts = texts_to_measure(evaluate, model, tokenizer, seqlen=seqlen, limit=limit, column=column)
    dense = Baseline(baseline) if isinstance(baseline, PreTrainedModel) else baseline
    with in_eval_mode(model), watched(notify) as tell:
        return _evaluation(model, tokenizer, texts, dense, loaded, limit=limit, batch_size=batch_size, notify=tell)


def _evaluation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, Tensor],
    dense: Baseline | None,
    loaded: LoadedTasks,
    *,
    limit: int | None,
    batch_size: int,
    notify: Notify,
) -> Evaluation:
    """Measure what has been checked and cut; see ``evaluate``."""
    measured = {}
    for name, windows in texts.items():
        advance = counting(notify, f"perplexity, {Path(name).name}", len(windows))
        measured[name] = _beside_baseline(model, windows, dense, advance)
    found: Evaluation = {
        "perplexity": {name: one.perplexity.value for name, one in measured.items()},
        "perplexity_stderr": {name: one.perplexity.stderr for name, one in measured.items()},
    }
    if dense is not None and dense.model is not model:
        found["agreement"] = {name: one.agreement for name, one in measured.items()}
    if loaded.items:
        found["tasks"] = measure_tasks(model, tokenizer, loaded, limit=limit, batch_size=batch_size, notify=notify)
        found["average"] = average(found["tasks"])
    return found
