"""Files that hold a table or one record a line; every reader yields each record with its place, for errors."""

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparlow.errors import InputError

TEXT = "text"  # the column that most data sets have
_ROWS = 64  # of a parquet file at a time, so that a bomb is noticed early
_NOT_UTF8 = re.compile(rb"\xff\xfe|\xfe\xff|\x00.\x00.|.\x00.\x00", re.DOTALL)  # UTF-16 and 32, with a mark or without
_DEEP = "it is nested too deeply"
_LONGEST = 200  # characters of a list of names that an error repeats
Row = tuple[Mapping[str, Any], str]  # a record, and where it stands
Reader = Callable[[Path, Sequence[str]], Iterator[Row]]  # of these columns at least, of which the first must be there


def decoded(data: bytes, where: str) -> str:
    """UTF-8 as text, without the mark that some editors put before it; InputError that names the place if it is none.

    Args:
        data: What a file holds.
        where: The file, or the file and the line.
    """
    try:
        if not _NOT_UTF8.match(data):
            return data.decode("utf-8-sig")
        why = "it seems to be UTF-16 or UTF-32"
    except UnicodeDecodeError as error:
        why = f"byte {error.start:,}"
    raise InputError(f"{where} is not UTF-8 text ({why}). Convert it, as with iconv -t UTF-8.")


def text_of(record: Mapping[str, Any], column: str, where: str) -> str:
    """The text of a record; InputError that names the place if there is none."""
    require_column(record, column, where)
    text = record[column]
    if not isinstance(text, str):
        raise InputError(f"{where}: the field {column!r} holds {type(text).__name__}, not text. Make it text.")
    return text


def require_column(names: Iterable[str], column: str, where: str) -> None:
    """Raise InputError, with the names that there are, if ``column`` is not one of them."""
    if column not in names:
        hint = "Give another file" if next(iter(names), None) is None else "Choose one with --column"
        raise InputError(f"{where}: there is no field {column!r}, only: {names_shown(names)}. {hint}.")


def names_shown(names: Iterable[str]) -> str:
    """Names for an error, of which a stranger's file may hold very long or very many ones."""
    text = ", ".join(map(str, names)) or "none"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"


def read_lines(path: Path, _columns: Sequence[str]) -> Iterator[Row]:
    """One JSON object a line."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}, line {number:,}"
            if number == 1 and _NOT_UTF8.match(line):
                raise InputError(f"{where}: not JSON in UTF-8. Convert it, as with iconv -t UTF-8.")
            if line.strip(b" \t\r\n\xef\xbb\xbf"):
                yield _record(line, where), where


def read_json(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """A list of objects, one object, or one object a line: all three are called .json."""
    data = path.read_bytes()
    if not decoded(data, str(path)).lstrip().startswith("[") and _first_line_is_json(data):
        yield from read_lines(path, columns)
        return
    content = _parsed(data, str(path))
    for number, record in enumerate(content if isinstance(content, list) else [content], start=1):
        where = f"{path}, record {number:,}"
        yield _object(record, where), where


def read_separated(path: Path, columns: Sequence[str], separator: str) -> Iterator[Row]:
    """A line of names, then one record each; a quoted field may hold separators and line breaks."""
    text = decoded(path.read_bytes(), str(path))
    limit = csv.field_size_limit(max(len(text), csv.field_size_limit()))  # a document may be longer than 131,072
    try:
        rows = csv.DictReader(_lines(text), delimiter=separator, strict=True)
        for column in columns[:1]:
            require_column(rows.fieldnames or (), column, f"{path}, line 1")
        for row in rows:
            where = f"{path}, line {rows.line_num:,}"
            if None in row:
                raise InputError(f"{where}: there are more fields than names in the first line. Put text in quotes.")
            yield row, where
    except csv.Error as error:
        raise InputError(
            f"{path} is not a table of fields separated by {separator!r}: {error}. "
            "Give another file, or another ending."
        ) from error
    finally:
        csv.field_size_limit(limit)


def read_parquet(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """The columns of a parquet file that are there; all of them if none is named."""
    from pyarrow import ArrowException, types
    from pyarrow.parquet import ParquetFile, read_schema

    try:
        schema = read_schema(path)
        names = schema.names
        for column in columns[:1]:
            require_column(names, column, str(path))
        chosen = [name for name in columns if name in names] or names
        # a value that comes again and again is stored once, and stays so in memory
        texts = [name for name in chosen if types.is_string(schema.field(name).type)]
        batches = ParquetFile(path, read_dictionary=texts).iter_batches(_ROWS, columns=chosen)
        records = (
            dict(zip(chosen, (value.as_py() for value in row), strict=True))
            for batch in batches
            for row in zip(*(batch.column(name) for name in chosen), strict=True)
        )
        for number, record in enumerate(records, start=1):
            yield record, f"{path}, row {number:,}"
    except ArrowException as error:
        raise InputError(f"{path} is not a parquet file: {error}. Give another file, or another ending.") from error


READERS: dict[str, Reader] = {
    ".csv": lambda path, columns: read_separated(path, columns, ","),
    ".json": read_json,
    ".jsonl": read_lines,
    ".ndjson": read_lines,
    ".parquet": read_parquet,
    ".tsv": lambda path, columns: read_separated(path, columns, "\t"),
}
"""How a file that holds a table is read, by its ending."""


def _record(line: bytes, where: str) -> Mapping[str, Any]:
    return _object(_parsed(line, where), where)


def _parsed(data: bytes, where: str) -> Any:  # noqa: ANN401 - whatever JSON holds
    try:
        return json.loads(data.decode("utf-8-sig"))
    except RecursionError:
        raise InputError(f"{where}: not JSON that can be read ({_DEEP}).") from None
    except ValueError as error:  # not JSON, or not UTF-8
        raise InputError(
            f'{where}: not JSON ({error}). Every record must be an object, such as {{"text": "…"}}.'
        ) from error


def _object(record: object, where: str) -> Mapping[str, Any]:
    if not isinstance(record, dict):
        raise InputError(f'{where}: not an object. Every record must be one, such as {{"text": "…"}}.')
    return record


def _first_line_is_json(data: bytes) -> bool:
    """Whether a file has one record a line, rather than one over many lines."""
    first = next((line for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n", 100) if line.strip()), b"")
    try:
        json.loads(first.decode("utf-8-sig"))
    except RecursionError:
        return True
    except ValueError:
        return False
    return True


def _lines(text: str) -> Iterator[str]:
    """The lines with their ends, cut at line breaks of files only and not at those of Unicode."""
    return iter(re.findall(r"[^\n]*\n|[^\n]+", text))
