"""Which corpora there are: one entry each, as data."""

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from sparlow.errors import InputError
from sparlow.text.reference import LanguageReference
from sparlow.text.sources import HubSplit, LocalFile, Source

_HUB_ID = re.compile(r"(?P<path>[A-Za-z0-9][\w.-]*/[\w.-]+)(?::(?P<config>[^/\s]+))?")
_FILE_ENDINGS = {".csv", ".json", ".jsonl", ".md", ".parquet", ".raw", ".text", ".tsv", ".txt"}


@dataclass(frozen=True)
class Corpus:
    """Where a corpus has its text and how published figures read it.

    Attributes:
        name: What the user calls it.
        summary: One line for the help.
        calibration: The documents that calibration windows are cut from.
        evaluation: The documents that perplexity is measured on.
        separator: Joins the documents for evaluation.
        running_text: The documents are the lines of one text, so calibration joins them as well.
        first_documents: Evaluation reads no more than these.
        first_windows: Evaluation keeps no more than these.
        characters: Of the text for evaluation, about; None where that is not known before it is read.
    """

    name: str
    summary: str
    calibration: Source
    evaluation: Source
    separator: str = "\n\n"
    running_text: bool = False
    first_documents: int | None = None
    first_windows: int | None = None
    characters: int | None = None

    def calibration_documents(self, seed: int) -> Iterator[str]:
        """The documents for calibration, one at a time in seeded order."""
        if self.running_text:
            return iter([self.separator.join(self.calibration.documents())])
        return self.calibration.documents(seed)

    def evaluation_text(self) -> str:
        """The whole text for evaluation."""
        return self.separator.join(islice(self.evaluation.documents(), self.first_documents))


_C4 = "allenai/c4"
_WIKITEXT = "Salesforce/wikitext"
_WIKITEXT_CONFIG = "wikitext-2-raw-v1"
# The repository holds a loading script, which datasets no longer runs; the hub's own conversion holds its rows.
_PTB = "ptb-text-only/ptb_text_only"
_CONVERTED = "refs/convert/parquet"

_NAMED = (
    Corpus(
        name="builtin",
        summary="Python's own language reference, a third of a megabyte of prose; needs no network",
        calibration=LanguageReference("calibration"),
        evaluation=LanguageReference("evaluation"),
        characters=100_000,
    ),
    Corpus(
        name="c4",
        summary="web pages: allenai/c4, en, first file of train and of validation",
        calibration=HubSplit(_C4, ("train",), file="en/c4-train.00000-of-01024.json.gz"),
        evaluation=HubSplit(_C4, ("validation",), file="en/c4-validation.00000-of-00008.json.gz"),
        separator=" ",
        first_documents=1100,
        first_windows=256,
    ),
    Corpus(
        name="wikitext2",
        summary="encyclopaedia articles: Salesforce/wikitext, wikitext-2-raw-v1, train and test",
        calibration=HubSplit(_WIKITEXT, ("train",), config=_WIKITEXT_CONFIG),
        evaluation=HubSplit(_WIKITEXT, ("test",), config=_WIKITEXT_CONFIG),
        running_text=True,
        characters=1_300_000,
    ),
    Corpus(
        name="ptb",
        summary="newspaper sentences: ptb-text-only/ptb_text_only (Penn Treebank), train and test",
        calibration=HubSplit(
            _PTB, ("train",), file="penn_treebank/train/0000.parquet", revision=_CONVERTED, column="sentence"
        ),
        evaluation=HubSplit(
            _PTB, ("test",), file="penn_treebank/test/0000.parquet", revision=_CONVERTED, column="sentence"
        ),
        separator=" ",
        running_text=True,
        characters=450_000,
    ),
)

CORPORA: dict[str, str] = {corpus.name: corpus.summary for corpus in _NAMED}
"""Name → what it is, in one line. Files and hub data sets are named by their path and id instead."""


def find_corpus(name: str) -> Corpus:
    """Find what `name` names: a corpus of `CORPORA`, a local file or a data set on the hub.

    Raises:
        InputError: There is no such corpus, or no such file.
    """
    for corpus in _NAMED:
        if corpus.name == name:
            return corpus
    path = Path(name)
    if path.is_dir():
        raise InputError(f"{name!r} is a directory. Give one text file.")
    if path.exists():
        source = LocalFile(path)
        return Corpus(name, "a local file", calibration=source, evaluation=source, characters=path.stat().st_size)
    ending = path.suffix.lower()
    hub_id = _HUB_ID.fullmatch(name)
    if hub_id and ending not in _FILE_ENDINGS:
        return _hub_corpus(name, hub_id["path"], hub_id["config"])
    if "/" in name or "\\" in name or ending:
        raise InputError(f"There is no file {name!r}. Check the path.")
    raise InputError(_unknown(name))


def _hub_corpus(name: str, path: str, config: str | None) -> Corpus:
    return Corpus(
        name,
        "a data set on the hub",
        calibration=HubSplit(path, ("train",), config=config),
        evaluation=HubSplit(path, ("test", "validation"), config=config),
        first_documents=10_000,  # test splits of a few thousand records are read whole, web crawls are not
    )


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name.lower(), CORPORA, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return (
        f"There is no corpus {name!r}.{hint} Give one of {', '.join(CORPORA)}, the path of a text, .jsonl or .parquet "
        "file, or a hub data set (owner/name or owner/name:config)."
    )
