"""Where documents come from: local files and the hub."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from textwrap import shorten
from typing import Any, Protocol, TypeVar

from sparlow.errors import InputError
from sparlow.text.tables import READERS, TEXT, Row, decoded, names_shown, text_of

# Documents fetched ahead of use: enough to mix neighbours, little beside the some thousand that 128 long ones take.
_SHUFFLE_BUFFER = 1_000
_EXPANSION, _SMALL = 100, 2**24  # text shrinks to a tenth at best; a file may unpack to so many times its size and more
PLAIN = frozenset({"", ".md", ".raw", ".rst", ".tex", ".text", ".tokens", ".txt"})  # endings of plain text
_PACKED = frozenset({".bz2", ".gz", ".lz4", ".xz", ".zip", ".zst"})

T = TypeVar("T")


class Source(Protocol):
    """Documents that can be read again and again."""

    def documents(self, seed: int | None = None) -> Iterator[str]:
        """The documents one at a time: in their own order, or in the order that `seed` gives."""

    @property
    def identity(self) -> str:
        """What tells where they come from: two sources of one identity hold text of one kind."""


def in_order(documents: Iterable[T], seed: int | None) -> Iterator[T]:
    """Documents or records held in memory, in their own order or in the one that `seed` gives."""
    ordered = list(documents)
    if seed is not None:
        random.Random(seed).shuffle(ordered)  # noqa: S311 - a reproducible choice, not a secret
    return iter(ordered)


@dataclass(frozen=True)
class GivenTexts:
    """Texts that the caller has in memory, each of them one document."""

    texts: tuple[str, ...]

    def documents(self, seed: int | None = None) -> Iterator[str]:
        """See `Source.documents`."""
        return in_order(self.texts, seed)

    @property
    def identity(self) -> str:
        """See `Source.identity`; nothing else comes from there."""
        return f"texts {id(self)}"


@dataclass(frozen=True)
class LocalFile:
    """A file: one document if it is plain text, else one a record.

    Attributes:
        path: The file; its ending decides how it is read, and must be one of ``READERS`` or ``PLAIN``.
        column: The column that holds the text, where the file is a table.
        records: First and last record to read of a table, counted from 1; all if left out.
    """

    path: Path
    column: str = TEXT
    records: tuple[int, int] | None = None

    def documents(self, seed: int | None = None) -> Iterator[str]:
        """See `Source.documents`; the whole file is read at once.

        Raises:
            InputError: The file is not what its ending says, or cannot be read.
        """
        return self.read((self.column,), lambda row, where: text_of(row, self.column, where), len, seed)

    def read(
        self,
        columns: Sequence[str],
        take: Callable[[Mapping[str, Any], str], T],
        size: Callable[[T], int],
        seed: int | None,
    ) -> Iterator[T]:
        """What is taken of each record, in its own order or the seed's; the whole file is read at once.

        Args:
            columns: That are read, of which the first must be there; all if none is named.
            take: Makes of a record and its place what is returned.
            size: Characters of what was taken.
            seed: Of the order.

        Raises:
            InputError: As above.
        """
        read = READERS.get(self.path.suffix.lower(), _read_plain)
        try:
            taken = (take(*row) for row in read(self.path, columns))
            return in_order(self._chosen(self._bounded(taken, size)), seed)
        except OSError as error:
            raise self._unreadable(error) from error

    def first(self) -> Mapping[str, Any]:
        """The first record with all its columns; an empty one if the file is no table, or empty.

        Raises:
            InputError: As above.
        """
        read = READERS.get(self.path.suffix.lower())
        try:
            return next((row for row, _ in read(self.path, ())), {}) if read else {}
        except OSError as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: OSError) -> InputError:
        return InputError(f"{self.path} cannot be read: {error.strerror or error}. Give another file.")

    def _bounded(self, taken: Iterator[T], size: Callable[[T], int]) -> Iterator[T]:
        """Refuse a file that unpacks to far more than it takes on disk, while it does so."""
        bound, characters = _EXPANSION * self.path.stat().st_size + _SMALL, 0
        for one in taken:
            characters += size(one)
            if characters > bound:
                raise InputError(f"{self.path} unpacks to more than {bound:,} characters. Give the text itself.")
            yield one

    def _chosen(self, taken: Iterator[T]) -> Iterator[T]:
        """Leave out the records that are not asked for; refuse those that are not there."""
        if self.records is None:
            yield from taken
            return
        (first, last), count = self.records, 0
        for count, one in enumerate(islice(taken, last), start=1):
            if count >= first:
                yield one
        if count < last:
            raise InputError(f"{self.path} holds {count:,} records, so there is no #{first}-{last}. Name others.")

    @property
    def identity(self) -> str:
        """See `Source.identity`; all records of a file count as one."""
        return f"file {self.path.resolve()}"


def require_records(path: Path, first: int, last: int) -> tuple[int, int]:
    """Return a range of records of a file; InputError if the file has no records, or the range none."""
    if path.suffix.lower() not in READERS:
        tables = ", ".join(READERS)
        raise InputError(f"{path} is no table, so it has no records {first} to {last}. Give a table ({tables}).")
    if not 1 <= first <= last:
        raise InputError(f"{path}#{first}-{last} names no records: they count from 1. Put the first before the last.")
    return first, last


def require_readable(path: Path) -> None:
    """Raise InputError if the ending of a file says that it is neither plain text nor a table that can be read."""
    ending = path.suffix.lower()
    if ending in _PACKED:
        raise InputError(f"{path} is compressed. Decompress it first.")
    if ending not in READERS and ending not in PLAIN:
        plain = ", ".join(sorted(PLAIN - {""}))
        raise InputError(
            f"{path} has the unknown ending {path.suffix}. Give a table ({', '.join(READERS)}) or plain text ({plain}, "
            "or no ending). A file of plain text can be renamed."
        )


def _read_plain(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    data = path.read_bytes()  # text mode would change the line ends
    if not data and not path.is_file():
        raise InputError(f"{path} gave no text. A pipe can be read only once. Give a file.")
    yield {columns[0]: decoded(data, str(path))}, str(path)


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
    column: str = TEXT

    def documents(self, seed: int | None = None) -> Iterator[str]:
        """See `Source.documents`; with a seed, order comes from a buffer of 1,000 documents. Fetches as it is drawn.

        Raises:
            InputError: The hub cannot be reached, or has no such data set, split or column.
        """
        where = f"The data set {self.path!r}"
        return (text_of(row, self.column, where) for row in self.rows(seed))

    def rows(self, seed: int | None = None) -> Iterator[Mapping[str, Any]]:
        """The records with all their columns, in the order of `documents`.

        Raises:
            InputError: As above, but for the column.
        """
        with _hub_failures(self.path):
            rows = self._open()
            yield from rows if seed is None else rows.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)

    @property
    def identity(self) -> str:
        """See `Source.identity`; configurations and splits of one data set count as one."""
        return f"hub {self.path.lower()}"

    def _open(self) -> Any:  # noqa: ANN401 - datasets.IterableDataset, of a library imported only here
        from datasets import load_dataset

        files = None if self.file is None else {self.splits[0]: self.file}
        parts = load_dataset(self.path, self.config, data_files=files, revision=self.revision, streaming=True)
        for split in self.splits:
            if split in parts:
                return parts[split]
        raise InputError(
            f"The data set {self.path!r} has no split {' or '.join(self.splits)}. It has: {names_shown(parts)}."
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
