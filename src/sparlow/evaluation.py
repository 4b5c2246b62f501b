"""Perplexity by one pinned protocol.

The text becomes windows of ``seqlen`` tokens without overlap (``text.evaluation_windows``); the negative log-likelihood
is averaged over the seqlen − 1 predictions of a window, then over windows; perplexity is its exponential. Papers differ
in exactly these choices, so figures compare only at the same text and seqlen.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparlow.errors import InputError
from sparlow.text import evaluation_windows

TOKENS_AT_ONCE = 2048  # logits of this many tokens are held at a time: 400 MB in float32 for 50,000 words


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: Tensor, advance: Callable[[int], None] = lambda _: None) -> float:
    """Perplexity of ``model`` on ``windows`` (n, seqlen) int64; the model is put in eval mode for it.

    Args:
        model: Any causal language model of transformers.
        windows: Token ids.
        advance: Called with the number of windows finished at a time, for a progress bar.
    """
    training = model.training
    model.eval()
    total = 0.0
    for batch in windows.split(max(TOKENS_AT_ONCE // windows.shape[1], 1)):
        ids = batch.to(model.device)  # (b, seqlen)
        logits = model(ids, use_cache=False).logits[:, :-1].float()  # (b, seqlen − 1, vocabulary)
        loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        total += loss.view(len(ids), -1).mean(1).double().sum().item()
        advance(len(ids))
    model.train(training)
    try:
        return math.exp(total / len(windows))
    except OverflowError:
        return math.inf


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    perplexity_on: Sequence[str] = ("builtin",),
    seqlen: int = 2048,
    limit: int | None = None,
) -> dict[str, dict[str, float]]:
    """Measure a model; works on compressed and plain ones alike.

    Args:
        model: Any causal language model of transformers, ours included.
        tokenizer: Its tokenizer.
        perplexity_on: Corpora or files, see ``sparlow.text``.
        seqlen: Tokens in a window; perplexities of different seqlen do not compare.
        limit: At most so many windows of each corpus.

    Returns:
        ``{"perplexity": {corpus: value}}``.
    """
    require_context(model, seqlen)
    found = {
        name: perplexity(model, evaluation_windows(name, tokenizer, seqlen=seqlen, limit=limit))
        for name in perplexity_on
    }
    return {"perplexity": found}


def require_context(model: PreTrainedModel, seqlen: int, option: str = "seqlen") -> None:
    """Raise InputError if windows of ``seqlen`` tokens, so given by ``option``, are longer than the model reads."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and seqlen > context:
        raise InputError(f"The model reads at most {context} tokens, and {option} is {seqlen}: lower --{option}.")


def require_tokenizer(tokenizer: PreTrainedTokenizerBase | None, name: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer, or say what to do without one."""
    if tokenizer is None:
        raise InputError(f"{name} has no tokenizer: give token windows instead of text, or add the tokenizer's files.")
    return tokenizer
