"""The two pages that leaderboard.py keeps: the table with its rows, and the log with its lines."""

import math
import re
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

from sparlow.errors import InputError
from sparlow.files import replacing

BOARD, LOG = "LEADERBOARD.md", "EXPERIMENTS.md"
MOST = 15  # rows
TEXTS = {"wikitext2": "wikitext", "c4": "c4"}  # columns, and what the name of such a text holds
COMMIT_DIGITS = 10
HEAD = """# Leaderboard

At most {most} compressed models, fewest bits first. `benchmarks/leaderboard.py` keeps this page: it adds and replaces
rows, and of too many it drops the one that is dominated most, whose perplexities lie highest above those of a row that
takes no more bytes.

Bits a weight count the compressed layers with masks and scales, bits a parameter and bytes the whole file. Perplexities
are given with their standard error where it is known; C4 is held out from calibration. Divergence is that of the
model's predictions from those of the dense one, in nats a token, on C4. Minutes are those of the compression, and of a
fine-tuning after it, on the processor named, without evaluation. Figures compare only where the commands evaluate
alike.

"""
LOG_HEAD = "# Experiments\n\nWhat was tried, newest last; `benchmarks/leaderboard.py` adds the lines.\n\n"


@dataclass(frozen=True)
class Row:
    """A compressed model, as the table shows it: fields are columns, in order; empty is what is not known."""

    bits_a_weight: str
    bits_a_parameter: str
    bytes: str
    wikitext2: str
    c4: str
    divergence: str
    minutes: str
    model: str
    what: str
    commit: str
    processor: str
    command: str

    @property
    def key(self) -> tuple[str, str]:
        """What a row is replaced by."""
        return self.model, self.command

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return int(self.bytes.replace(",", ""))

    def perplexity(self, text: str) -> float | None:
        """The perplexity in one of the columns of ``TEXTS``."""
        shown: str = getattr(self, text)
        return float(shown.split(" ± ", maxsplit=1)[0]) if shown else None


COLUMNS = {
    "bits_a_weight": "bits a weight",
    "bits_a_parameter": "bits a parameter",
    "bytes": "bytes",
    "wikitext2": "WikiText-2",
    "c4": "C4, held out",
    "divergence": "divergence",
    "minutes": "minutes",
    "model": "model",
    "what": "what",
    "commit": "commit",
    "processor": "processor",
    "command": "command",
}


# --- the table -------------------------------------------------------------------------------------------------------


def with_row(rows: Sequence[Row], row: Row) -> tuple[list[Row], list[Row]]:
    """Add or replace a row; return the rows, fewest bits first, and those that went because there were too many."""
    kept, dropped = [*(other for other in rows if other.key != row.key), row], []
    while len(kept) > MOST:
        worst = max(kept, key=lambda each: dominated(each, kept))
        kept.remove(worst)
        dropped.append(worst)
    return sorted(kept, key=lambda each: (float(each.bits_a_weight), each.size, each.key)), dropped


def dominated(row: Row, rows: Sequence[Row]) -> float:
    """How high the perplexities of a row lie above those of another of its model that takes no more bytes.

    Returns:
        The largest mean log ratio over the texts that both were measured on: above 0 where another one is better and
        no larger, below 0 where the row pays for its bytes, and −∞ where it cannot be compared.
    """
    others = (other for other in rows if other is not row and other.model == row.model and other.size <= row.size)
    return max((_above(row, other) for other in others), default=-math.inf)


def _above(row: Row, other: Row) -> float:
    pairs = [(row.perplexity(text), other.perplexity(text)) for text in TEXTS]
    ratios = [math.log(mine / theirs) for mine, theirs in pairs if mine is not None and theirs is not None]
    return sum(ratios) / len(ratios) if ratios else -math.inf


def read_board(path: Path) -> list[Row]:
    """Read the rows of the table; none if there is no such file.

    Raises:
        InputError: The table is not one that this script wrote.
    """
    if not path.exists():
        return []
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    cells = [[_plain(cell.strip()) for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    if len(cells) < 2 or cells[0] != [*COLUMNS.values()]:
        raise InputError(f"The columns of {path} are not those that this script writes. Restore the file from git.")
    try:
        rows = [Row(*row) for row in cells[2:]]
        for row in rows:
            _ = float(row.bits_a_weight), row.size, [row.perplexity(text) for text in TEXTS]
    except (TypeError, ValueError) as error:
        raise InputError(f"A row of {path} cannot be read: {error}. Restore the file from git.") from None
    return rows


def board(rows: Sequence[Row]) -> str:
    """Return the whole page."""
    right = sum(1 for each in fields(Row) if each.name not in ("model", "what", "commit", "processor", "command"))
    rule = ["--:"] * right + ["---"] * (len(COLUMNS) - right)
    lines = [[*COLUMNS.values()], rule, *([_cell(c) for c in astuple(row)[:-1]] + [_code(row.command)] for row in rows)]
    return HEAD.format(most=MOST) + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _code(command: str) -> str:
    """Return a command as code: between more backticks than it holds itself."""
    ticks = "`" * (1 + max(map(len, re.findall(r"`+", command)), default=0))
    return f"{ticks} {_cell(command)} {ticks}" if "`" in command else f"`{_cell(command)}`"


def _plain(cell: str) -> str:
    """Undo ``_cell`` and ``_code``."""
    code = re.fullmatch(r"(`+)(.*)\1", cell)
    return (code[2].strip() if code else cell).replace("\\|", "|")


# --- the log ---------------------------------------------------------------------------------------------------------


def entry(row: Row | None, fate: str, note: str, commit: str) -> str:
    """Return a line of the log.

    Args:
        row: What was measured; None where there is only a note.
        fate: What became of the row.
        note: In plain words; may be empty.
        commit: Of the sources.
    """
    date, note = datetime.now(UTC).date().isoformat(), " ".join(note.split())
    if row is None:
        return f"* {date}, {commit[:COMMIT_DIGITS]}: {note}\n"
    texts = [f"{COLUMNS[name]} {getattr(row, name)}" for name in (*TEXTS, "divergence") if getattr(row, name)]
    said = [f"{row.model}, {row.what}, {row.bits_a_weight} bits a weight, {row.bytes} bytes", *texts, fate]
    return f"* {date}, {row.commit}: {'; '.join(said)}. {note + ' ' if note else ''}{_code(row.command)}\n"


def append(path: Path, line: str) -> None:
    """Add a line at the end of the log."""
    before = path.read_text(encoding="utf-8") if path.exists() else LOG_HEAD
    write(path, before + line)


def write(path: Path, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
