"""Documents into windows of token ids; the package's docstring states the rules."""

import hashlib
import random
import re
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from sparlow.errors import InputError
from sparlow.text.corpora import Corpus, corpus_of, find_corpus
from sparlow.text.sources import LocalFile
from sparlow.text.tables import TEXT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHARACTERS = 4  # a token of English, about; where a vocabulary is small, every character is one
_SMALL_VOCABULARY = 1024
_UNKNOWN_WINDOWS = 256  # of a text that is on the hub, as of c4
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, as in JSON that was cut; no tokenizer takes it
_PATIENCE = 200  # documents a sample; of the first thousand of C4, 32 have 2048 tokens and 6 have 4096


def calibration_windows(
    corpus: str | Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    samples: int,
    seqlen: int,
    seed: int,
    begin: tuple[int, ...] = (),
    column: str = TEXT,
) -> Tensor:
    """Draw `samples` windows of `seqlen` tokens for calibration, the same for the same seed.

    Args:
        corpus: A name of `CORPORA`, the path of a file, or a hub data set; or texts, each of them a document.
        tokenizer: The model's; special tokens are not added, but for its end-of-text token between packed pieces.
        samples: How many windows, at least 1.
        seqlen: Tokens in a window, at least 1.
        seed: 0 or more; decides the order of documents and the offsets of windows.
        begin: Token ids that every window begins with, within its `seqlen` tokens; see `beginning`.
        column: That holds the text of a file or a data set on the hub.

    Returns:
        Token ids (samples, seqlen), int64; no two windows overlap.

    Raises:
        InputError: The corpus does not exist, cannot be read or has too little text, or a number is out of range.
    """
    found = find_corpus(corpus, column) if isinstance(corpus, str) else corpus_of(corpus)
    windows, tokens = _draw(found, tokenizer, samples, seqlen, seed, begin)
    if len(windows) < samples:
        _require_any(found.name, tokens)
        length = _room(seqlen, begin)
        raise InputError(
            f"{found.name} holds {tokens:,} tokens; {samples} samples of {length} need at least {samples * length:,}. "
            "Lower --samples or --seqlen, or give more text."
        )
    return windows


def _require_any(corpus: str, tokens: int) -> None:
    """Raise InputError if a text that is too short holds nothing at all, which no smaller number would help."""
    if not tokens:
        raise InputError(f"{corpus} holds no text. Give another one.")


def training_windows(
    corpus: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    samples: int,
    seqlen: int,
    seed: int,
    begin: tuple[int, ...] = (),
    column: str = TEXT,
) -> Tensor:
    """Draw windows as `calibration_windows` does, but no more than the text has: training may read them again.

    Returns:
        Token ids (at least 1 and at most `samples`, seqlen), int64; no two windows overlap.

    Raises:
        InputError: The corpus does not exist, cannot be read or fills no window, or a number is out of range.
    """
    windows, tokens = _draw(find_corpus(corpus, column), tokenizer, samples, seqlen, seed, begin)
    if not len(windows):
        _require_any(corpus, tokens)
        length = _room(seqlen, begin)
        raise InputError(
            f"{corpus} holds {tokens:,} tokens, one window needs {length:,}. Lower --block-size, or give more text."
        )
    return windows


def _draw(
    corpus: Corpus,
    tokenizer: "PreTrainedTokenizerBase",
    samples: int,
    seqlen: int,
    seed: int,
    begin: tuple[int, ...],
) -> tuple[Tensor, int]:
    """Return at most `samples` windows (n, seqlen), each begun with `begin`, and how many tokens were read."""
    _require_at_least("samples", samples, 1)
    _require_at_least("seqlen", seqlen, 1)
    _require_at_least("seed", seed, 0)
    length = _room(seqlen, begin)
    needed = samples * length
    rng = random.Random(seed)  # noqa: S311 - a reproducible choice, not a secret
    # Documents of one token at least would suffice at this bound: it ends a stream of empty ones.
    documents = islice(corpus.calibration_documents(seed), max(needed, _PATIENCE * samples))
    tokenised = (torch.tensor(_token_ids(tokenizer, text, special=False), dtype=torch.int64) for text in documents)
    chosen, spare, pieces = _visit(tokenised, samples, length, rng)
    tokens = length * len(chosen + spare) + sum(map(len, pieces))
    if len(chosen) < samples:
        spare += _pack(pieces, tokenizer.eos_token_id, length)
        rng.shuffle(spare)
        chosen += spare[: samples - len(chosen)]
    drawn = torch.stack(chosen) if chosen else torch.zeros(0, length, dtype=torch.int64)
    return _begun(drawn, begin), tokens


def evaluation_windows(
    corpus: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    seqlen: int,
    limit: int | None = None,
    begin: tuple[int, ...] = (),
    column: str = TEXT,
) -> Tensor:
    """Cut the evaluation text of a corpus into windows of `seqlen` tokens, in order.

    Args:
        corpus: A name of `CORPORA`, the path of a file, or a hub data set.
        tokenizer: The model's, called with its default special tokens, once for the whole text.
        seqlen: Tokens in a window, at least 2: the first is predicted from nothing.
        limit: Keep the first so many windows.
        begin: Token ids that every window begins with, within its `seqlen` tokens; the text then has no special ones.
        column: That holds the text of a file or a data set on the hub.

    Returns:
        Token ids (windows, seqlen), int64.

    Raises:
        InputError: The corpus does not exist, cannot be read or fills no window, or a number is out of range.
    """
    _require_at_least("seqlen", seqlen, 2)
    if limit is not None:
        _require_at_least("limit", limit, 1)
    length = _room(seqlen, begin)
    found = find_corpus(corpus, column)
    ids = _token_ids(tokenizer, found.evaluation_text(), special=not begin)
    if len(ids) < length:
        _require_any(corpus, len(ids))
        raise InputError(
            f"{corpus} holds {len(ids):,} tokens, one window needs {length:,}. Lower --seqlen, or give more text."
        )
    count = min(bound for bound in (len(ids) // length, found.first_windows, limit) if bound is not None)
    return _begun(torch.tensor(ids[: count * length], dtype=torch.int64).view(count, length), begin)


def expected_windows(corpus: str, vocabulary: int, *, seqlen: int, limit: int | None = None, column: str = TEXT) -> int:
    """Return about how many windows `evaluation_windows` will cut, before any text is read but records of a table.

    Args:
        corpus: A name of `CORPORA`, the path of a file, or a hub data set.
        vocabulary: Tokens there are.
        seqlen: Tokens in a window.
        limit: At most so many windows.
        column: That holds the text of a file.

    Raises:
        InputError: There is no such corpus, file or record.
    """
    found = find_corpus(corpus, column)
    characters = found.characters
    if isinstance(found.evaluation, LocalFile) and found.evaluation.records:  # a part of a file is counted
        characters = sum(map(len, found.evaluation.documents()))
    tokens = (characters or 0) // (_CHARACTERS if vocabulary > _SMALL_VOCABULARY else 1)
    cut = _UNKNOWN_WINDOWS if characters is None else max(tokens // seqlen, 1)
    return min(bound for bound in (cut, found.first_windows, limit) if bound is not None)


def fingerprint(windows: Tensor) -> str:
    """Sha256, in hex, of the shape and the ids of windows (n, seqlen): equal exactly if the windows are."""
    digest = hashlib.sha256(str(tuple(windows.shape)).encode())
    digest.update(windows.to("cpu", torch.int64).numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def _token_ids(tokenizer: "PreTrainedTokenizerBase", text: str, *, special: bool) -> list[int]:
    # Not verbose, or it would warn that the text is longer than the model's context, which is why we cut it.
    text = _LONE_SURROGATE.sub("\ufffd", text)
    encoding = tokenizer(text, add_special_tokens=special, return_attention_mask=False, verbose=False)
    return cast("list[int]", encoding["input_ids"])


def _room(seqlen: int, begin: tuple[int, ...]) -> int:
    """Return how many tokens of text a window of ``seqlen`` has beside those it begins with."""
    if begin:
        _require_at_least("seqlen", seqlen, len(begin) + 1)
    return seqlen - len(begin)


def _begun(windows: Tensor, begin: tuple[int, ...]) -> Tensor:
    """Put ``begin`` before every window."""
    first = torch.tensor(begin, dtype=torch.int64).expand(len(windows), -1)
    return torch.cat([first, windows], 1) if begin else windows


def _visit(
    documents: Iterable[Tensor], samples: int, seqlen: int, rng: random.Random
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Cut documents until enough are long or patience ends: a window of each long one, their others, what is left."""
    chosen: list[Tensor] = []
    spare: list[Tensor] = []
    pieces: list[Tensor] = []
    tokens = 0
    for visited, ids in enumerate(documents, start=1):
        tokens += len(ids)
        windows, ends = _cut(ids, seqlen, rng)
        chosen += windows[:1]
        spare += windows[1:]
        pieces += ends
        if len(chosen) == samples or (visited >= _PATIENCE * samples and tokens >= samples * seqlen):
            break
    return chosen, spare, pieces


def _cut(ids: Tensor, seqlen: int, rng: random.Random) -> tuple[list[Tensor], list[Tensor]]:
    """Cut one document into windows end to end, the randomly placed one first, and the ends that fill none."""
    if len(ids) < seqlen:
        return [], [ids]
    start = rng.randrange(len(ids) - seqlen + 1)
    phase = start % seqlen
    end = len(ids) - (len(ids) - phase) % seqlen
    windows = list(ids[phase:end].view(-1, seqlen))
    windows.insert(0, windows.pop(start // seqlen))
    return windows, [ids[:phase], ids[end:]]


def _pack(pieces: Iterable[Tensor], separator: int | None, seqlen: int) -> list[Tensor]:
    """Join pieces of text by a token, if there is one, and cut the whole into windows."""
    between = torch.tensor([] if separator is None else [separator], dtype=torch.int64)
    parts = [part for piece in pieces if len(piece) for part in (between, piece)][1:]
    joined = torch.cat(parts or [between[:0]])
    return list(joined[: len(joined) // seqlen * seqlen].view(-1, seqlen))


def _require_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise InputError(f"{name} must be at least {least}, not {value}.")
