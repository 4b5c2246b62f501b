"""Which tokens of a chat are answers: by the marks of the tokenizer's chat template, else by what it writes for each.

A template with ``{% generation %}`` says it itself. Of any other the chat is rendered up to each answer, with what the
template writes to ask for one, and up to its end; the answer is what the second has more than the first. Both must be
beginnings of the whole chat, and so they are checked to be: a template that writes an earlier answer in another way
once more follows, as those do that drop its reasoning, cannot be split so.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparlow.errors import InputError
from sparlow.text.chats import ANSWERS, Chat, chats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # a label that takes no part in the loss
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PATIENCE = 200  # chats read for each that is wanted, at most


@dataclass(frozen=True)
class Chats:
    """Chats as tokens.

    Attributes:
        ids: Token ids of each (tokens,) int64.
        labels: The same where a token belongs to an answer, else ``IGNORED``.
        cut: How many were longer than they may be, and were cut.
        left_out: How many had no answer, or none within what is left of them.
    """

    ids: Sequence[Tensor]
    labels: Sequence[Tensor]
    cut: int
    left_out: int


def training_chats(
    corpus: str, column: str, tokenizer: "PreTrainedTokenizerBase", *, samples: int, seqlen: int, seed: int
) -> Chats:
    """Read at most `samples` chats with an answer in seeded order, each cut to its first `seqlen` tokens.

    Args:
        corpus: A file or a hub data set.
        column: The field that holds the messages, which `chat_column` finds.
        tokenizer: The model's, with a chat template.
        samples: At least 1.
        seqlen: At least 2.
        seed: 0 or more.

    Raises:
        InputError: A record is no chat, the template cannot be used, or no chat has an answer.
    """
    ids, labels, cut, left_out = [], [], 0, 0
    for chat in islice(chats(corpus, column, seed), _PATIENCE * samples):
        tokens, said = tokens_of(chat, tokenizer)
        cut += len(tokens) > seqlen
        of = torch.where(said, tokens, IGNORED)[:seqlen]
        if (of[1:] == IGNORED).all():  # the first token is never predicted
            left_out += 1
            continue
        ids.append(tokens[:seqlen])
        labels.append(of)
        if len(ids) == samples:
            break
    if not ids:
        raise InputError(
            f"No chat of {corpus} has an answer (a message of the role {ANSWERS!r}) within its first {seqlen:,} "
            "tokens. Raise --block-size, or give other chats."
        )
    return Chats(ids, labels, cut, left_out)


def tokens_of(chat: Chat, tokenizer: "PreTrainedTokenizerBase") -> tuple[Tensor, Tensor]:
    """Return the token ids of a chat (tokens,) int64, and which of them belong to answers (tokens,) bool.

    Raises:
        InputError: The template is missing, refuses the chat, or cannot be split into questions and answers.
    """
    if not tokenizer.chat_template:
        raise InputError("The tokenizer has no chat template. Put chat_template.jinja beside it, or give plain text.")
    if not tokenizer.is_fast:
        raise InputError("The tokenizer does not tell which characters its tokens stand for. Give plain text.")
    if not any(message["role"] == ANSWERS for message in chat.messages):
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool)
    if _MARKS.search(_template(tokenizer, chat)):
        found = _applied(tokenizer, chat, len(chat.messages), tokenize=True)
        return torch.tensor(found["input_ids"]), torch.tensor(found["assistant_masks"], dtype=torch.bool)
    whole = _applied(tokenizer, chat, len(chat.messages))
    spans = _spans(tokenizer, chat, whole)
    found = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    said = [any(first < end and start < last for first, last in spans) for start, end in found["offset_mapping"]]
    return torch.tensor(found["input_ids"]), torch.tensor(said)


def _spans(tokenizer: "PreTrainedTokenizerBase", chat: Chat, whole: str) -> list[tuple[int, int]]:
    """Return the first character of each answer within the whole chat, and the one behind its last."""
    found = []
    for i, message in enumerate(chat.messages):
        if message["role"] != ANSWERS:
            continue
        asked = _applied(tokenizer, chat, i, add_generation_prompt=True) if i else None
        told = whole if i + 1 == len(chat.messages) else _applied(tokenizer, chat, i + 1)
        if asked is None or not (whole.startswith(told) and told.startswith(asked)):
            raise InputError(
                f"{chat.where}: the tokenizer's chat template does not show where the answer in message {i + 1} begins "
                "and ends. Mark answers in it with {% generation %}, or give chats of one question and one answer."
            )
        found.append((len(asked), len(told)))
    return found


def _template(tokenizer: "PreTrainedTokenizerBase", chat: Chat) -> str:
    """Return the template that renders a chat, for there may be one of its own for chats with tools."""
    untyped: Any = tokenizer  # which declares narrower types than it takes
    try:
        return str(untyped.get_chat_template(tools=chat.tools))
    except ValueError as error:
        raise InputError(f"The tokenizer's chat template cannot be used ({error}). Give it one template.") from error


def _applied(tokenizer: "PreTrainedTokenizerBase", chat: Chat, count: int, **options: bool) -> Any:  # noqa: ANN401 - text or tokens
    """Render the first messages of a chat; with ``tokenize`` as tokens with the template's marks."""
    from jinja2 import TemplateError

    untyped: Any = tokenizer
    marked = {"return_dict": True, "return_assistant_tokens_mask": True} if options.get("tokenize") else {}
    choices = {"tokenize": False} | options | marked
    try:
        return untyped.apply_chat_template(list(chat.messages[:count]), tools=chat.tools, **choices)
    except (TemplateError, TypeError, ValueError, KeyError) as error:  # of the stranger's template
        raise InputError(
            f"{chat.where}: the tokenizer's chat template refuses the chat: {_sentence(error)} Give it another."
        ) from error


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())[:200] or type(error).__name__
    return text if text.endswith(".") else text + "."
