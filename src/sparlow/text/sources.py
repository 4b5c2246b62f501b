"""Where documents come from: local files and the hub."""

import json
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any, Protocol

from sparlow.errors import InputError

# Documents fetched ahead of use: enough to mix neighbours, little beside the some thousand that 128 long ones take.
_SHUFFLE_BUFFER = 1_000
_EXPANSION, _SMALL = 100, 2**24  # text shrinks to a tenth at best; a file may unpack to so many times its size and more
_ROWS = 64  # of a parquet file at a time, so that a bomb is noticed early


class Source(Protocol):
    """Documents that can be read again and again."""

    def documents(self, seed: int | None = None) -> Iterator[str]:
        """The documents one at a time: in their own order, or in the order that `seed` gives."""


def in_order(documents: Iterable[str], seed: int | None) -> Iterator[str]:
    """Documents held in memory, in their own order or in the one that `seed` gives."""
    ordered = list(documents)
    if seed is not None:
        random.Random(seed).shuffle(ordered)  # noqa: S311 - a reproducible choice, not a secret
    return iter(ordered)


@dataclass(frozen=True)
class LocalFile:
    """A file: one document if it is plain text, else one a record.

    Attributes:
        path: The file; its ending decides how it is read.
    """

    path: Path

    def documents(self, seed: int | None = None) -> Iterator[str]:
        """See `Source.documents`; the whole file is read at once.

        Raises:
            InputError: The file is not what its ending says, or cannot be read.
        """
        read = _READERS.get(self.path.suffix.lower(), _read_plain)
        try:
            return in_order(self._bounded(read(self.path)), seed)
        except OSError as error:
            raise InputError(f"{self.path} cannot be read: {error.strerror or error}. Give another file.") from error

    def _bounded(self, documents: Iterator[str]) -> Iterator[str]:
        """Refuse a file that unpacks to far more than it takes on disk, while it does so."""
        bound, characters = _EXPANSION * self.path.stat().st_size + _SMALL, 0
        for text in documents:
            characters += len(text)
            if characters > bound:
                raise InputError(f"{self.path} unpacks to more than {bound:,} characters. Give the text itself.")
            yield text


def _read_plain(path: Path) -> Iterator[str]:
    try:
        yield path.read_bytes().decode("utf-8")  # bytes: text mode would change the line ends
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text (byte {error.start:,}). Give a UTF-8 text, .jsonl or .parquet file."
        ) from error


def _read_jsonl(path: Path) -> Iterator[str]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number:,}"
            try:
                record = json.loads(line)
            except ValueError as error:  # not JSON, or not UTF-8
                raise InputError(
                    f'{where}: not JSON ({error}). Every line must be an object, such as {{"text": "…"}}.'
                ) from error
            if not isinstance(record, dict):
                raise InputError(f'{where}: not an object. Every line must be one, such as {{"text": "…"}}.')
            yield _text_of(record, "text", where)


def _read_parquet(path: Path) -> Iterator[str]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile, read_schema

    try:
        _require_column(read_schema(path).names, "text", str(path))
        # a value that comes again and again is stored once, and stays so in memory
        batches = ParquetFile(path, read_dictionary=["text"]).iter_batches(_ROWS, columns=["text"])
        records = ({"text": value.as_py()} for batch in batches for value in batch.column(0))
        for number, record in enumerate(records, start=1):
            yield _text_of(record, "text", f"{path}, row {number:,}")
    except ArrowException as error:
        raise InputError(f"{path} is not a parquet file: {error}. Give another file, or another ending.") from error


_READERS: dict[str, Callable[[Path], Iterator[str]]] = {".jsonl": _read_jsonl, ".parquet": _read_parquet}


@dataclass(frozen=True)
class HubSplit:
    """One split of a data set on the hub, streamed.

    Attributes:
        path: `owner/name`.
        splits: The first of these that the data set has is read.
        config: The configuration, where there are several.
        file: Read this file of the repository only, as the first of `splits`.
        revision: Branch or commit of the repository.
        column: The column that holds the text.
    """

    path: str
    splits: tuple[str, ...]
    config: str | None = None
    file: str | None = None
    revision: str | None = None
    column: str = "text"

    def documents(self, seed: int | None = None) -> Iterator[str]:
        """See `Source.documents`; with a seed, order comes from a buffer of 1,000 documents. Fetches as it is drawn.

        Raises:
            InputError: The hub cannot be reached, or has no such data set, split or column.
        """
        with _hub_failures(self.path):
            rows = self._open()
            if seed is not None:
                rows = rows.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
            for row in rows:
                yield _text_of(row, self.column, f"The data set {self.path!r}")

    def _open(self) -> Any:  # noqa: ANN401 - datasets.IterableDataset, of a library imported only here
        from datasets import load_dataset

        files = None if self.file is None else {self.splits[0]: self.file}
        parts = load_dataset(self.path, self.config, data_files=files, revision=self.revision, streaming=True)
        for split in self.splits:
            if split in parts:
                return parts[split]
        raise InputError(
            f"The data set {self.path!r} has no split {' or '.join(self.splits)}. It has: {_names(parts)}."
        )


@contextmanager
def _hub_failures(path: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        # Everything, because datasets, the hub's client, HTTP, fsspec and the file readers share no base class.
        reason = shorten(f"{type(error).__name__}: {error}", 200, placeholder=" …")
        raise InputError(
            f"The data set {path!r} could not be read from the hub ({reason}). Check its name and the connection, "
            "or give a local .txt, .jsonl or .parquet file in its place."
        ) from error


def _text_of(record: dict[str, Any], column: str, where: str) -> str:
    _require_column(record, column, where)
    text = record[column]
    if not isinstance(text, str):
        raise InputError(f"{where}: the field {column!r} holds {type(text).__name__}, not text. Make it text.")
    return text


def _require_column(names: Iterable[str], column: str, where: str) -> None:
    if column not in names:
        raise InputError(
            f"{where}: there is no field {column!r}, only: {_names(names)}. Name the one with the text {column!r}."
        )


def _names(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
