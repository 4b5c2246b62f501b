"""The texts on which models are measured, cut into windows, and what they ask of a model."""

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparlow.errors import InputError
from sparlow.text import WITH_BOS, beginning, evaluation_windows


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
