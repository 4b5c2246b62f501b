"""Chats: records that hold a list of messages, ``{"role": "user", "content": "…"}`` each, in place of a text."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparlow.errors import InputError
from sparlow.text.corpora import CORPORA, find_corpus
from sparlow.text.sources import HubSplit, LocalFile
from sparlow.text.tables import TEXT, require_column

MESSAGES = "messages"  # the field that is read where a record has no text and no other is named
ANSWERS = "assistant"  # the role whose messages are answers
_TOOLS = "tools"  # beside the messages: what the model may call, which templates write out


@dataclass(frozen=True)
class Chat:
    """One record.

    Attributes:
        messages: Of which each has a role, at least.
        tools: What the model may call, if anything.
        where: The record's place, for errors.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Any] | None
    where: str


def chat_column(name: str, column: str = TEXT) -> str | None:
    """Return the field of a file or a hub data set that holds chats, by its first record; None if it holds text.

    Args:
        name: Of a corpus.
        column: That holds the text, or the messages; of ``text``, the default, ``messages`` may stand in its place.

    Raises:
        InputError: There is no such corpus, or its first record cannot be read.
    """
    source = None if name in CORPORA else find_corpus(name, column).require_calibration()
    if not isinstance(source, LocalFile | HubSplit):
        return None
    first = source.first() if isinstance(source, LocalFile) else next(source.rows(), {})
    field = MESSAGES if column == TEXT and TEXT not in first else column
    found = first.get(field)
    return field if isinstance(found, list) and all(isinstance(one, dict) for one in found) else None


def chats(name: str, column: str, seed: int) -> Iterator[Chat]:
    """The chats of a file or a hub data set in the order that ``seed`` gives.

    Args:
        name: Of a corpus for which ``chat_column`` found ``column``.
        column: That field.
        seed: 0 or more.

    Raises:
        InputError: A record is no chat.
    """
    source = find_corpus(name, column).require_calibration()
    if isinstance(source, LocalFile):
        columns = (column, _TOOLS)
        return source.read(columns, lambda row, where: _chat(row, column, where), _characters, seed)
    if not isinstance(source, HubSplit):
        raise InputError(f"{name} holds no chats. Give a file or a hub data set.")
    where = f"The data set {name!r}"
    return (_chat(row, column, where) for row in source.rows(seed))


def _chat(row: Mapping[str, Any], column: str, where: str) -> Chat:
    require_column(row, column, where)
    messages, tools = row[column], row.get(_TOOLS) or None
    if not isinstance(messages, list):
        raise InputError(f"{where}: the field {column!r} holds {type(messages).__name__}, not a list of messages.")
    if tools is not None and not isinstance(tools, list):
        raise InputError(f"{where}: the field {_TOOLS!r} holds {type(tools).__name__}. Make it a list.")
    return Chat([_message(one, f"{where}, message {i}") for i, one in enumerate(messages, start=1)], tools, where)


def _message(message: object, where: str) -> Mapping[str, Any]:
    """A message without the fields that say nothing, as tables put them into every message once one has them."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise InputError(f'{where} has no role. Write messages as {{"role": "user", "content": "…"}}.')
    if message.get("weight") not in (None, 1):
        raise InputError(f"{where} has a weight, and all answers count alike. Leave out the weights.")
    return {name: value for name, value in message.items() if value is not None or name == "content"}


def _characters(chat: Chat) -> int:
    return sum(len(str(message.get("content"))) for message in chat.messages)
