"""Which corpora there are: one entry each, as data."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from sparlow.errors import InputError
from sparlow.schema import meant
from sparlow.text.beginning import WITH_BOS
from sparlow.text.novel import Novel
from sparlow.text.reference import LanguageReference
from sparlow.text.sources import PLAIN, GivenTexts, HubSplit, LocalFile, Source, require_readable, require_records
from sparlow.text.tables import READERS, TEXT

_HUB_ID = re.compile(r"(?P<path>[A-Za-z0-9][\w.-]*/[\w.-]+)(?::(?P<config>[^/\s]+))?")

_RECORDS = re.compile(r"(?P<path>.+)#([0-9]{1,12})-([0-9]{1,12})", re.DOTALL)


@dataclass(frozen=True)
class Corpus:
    """Where a corpus has its text and how published figures read it.

    Attributes:
        name: What the user calls it.
        summary: One line for the help.
        calibration: The documents that calibration windows are cut from; None for text that is there to measure on.
        evaluation: The documents that perplexity is measured on.
        separator: Joins the documents for evaluation.
        running_text: The documents are the lines of one text, so calibration joins them as well.
        first_documents: Evaluation reads no more than these.
        first_windows: Evaluation keeps no more than these.
        characters: Of the text for evaluation, about; None where that is not known before it is read.
    """

    name: str
    summary: str
    calibration: Source | None
    evaluation: Source
    separator: str = "\n\n"
    running_text: bool = False
    first_documents: int | None = None
    first_windows: int | None = None
    characters: int | None = None

    def calibration_documents(self, seed: int) -> Iterator[str]:
        """The documents for calibration, one at a time in seeded order."""
        source = self.require_calibration()
        if self.running_text:
            return iter([self.separator.join(source.documents())])
        return source.documents(seed)

    def require_calibration(self) -> Source:
        """Return where the text for calibration comes from; InputError if the corpus is for evaluation only."""
        if self.calibration is None:
            others = ", ".join(corpus.name for corpus in _NAMED if corpus.calibration)
            raise InputError(f"The corpus {self.name!r} is there to measure on. Take other text, such as: {others}.")
        return self.calibration

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
        name="novel",
        summary="six chapters of Jane Austen's Persuasion, for evaluation only; needs no network",
        calibration=None,
        evaluation=Novel(),
        characters=92_000,
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


def find_corpus(name: str, column: str = TEXT) -> Corpus:
    """Find what `name` names: a corpus of `CORPORA`, a local file or a data set on the hub.

    Args:
        name: As the package's docstring says.
        column: That holds the text of a file or a data set; the corpora of `CORPORA` have their own.

    Raises:
        InputError: There is no such corpus, no such file, or its ending is unknown.
    """
    for corpus in _NAMED:
        if corpus.name == name:
            return corpus
    path = Path(name)
    if path.is_dir():
        raise InputError(f"{name!r} is a directory. Give one text file.")
    if path.exists():
        require_readable(path)
        source = LocalFile(path, column)
        return Corpus(name, "a local file", calibration=source, evaluation=source, characters=path.stat().st_size)
    part = _RECORDS.fullmatch(name)
    if part and Path(part["path"]).is_file():
        source = LocalFile(Path(part["path"]), column, require_records(Path(part["path"]), *map(int, part.group(2, 3))))
        return Corpus(name, "records of a local file", calibration=source, evaluation=source)
    ending = path.suffix.lower()
    hub_id = _HUB_ID.fullmatch(name)
    if hub_id and (not ending or ending not in {*READERS, *PLAIN}):
        return _hub_corpus(name, hub_id["path"], hub_id["config"], column)
    if "/" in name or "\\" in name or ending:
        raise InputError(f"There is no file {name!r}. Check the path.")
    raise InputError(_unknown(name))


def corpus_of(texts: Sequence[str]) -> Corpus:
    """Return the corpus of texts that the caller has in memory."""
    source = GivenTexts(tuple(texts))
    return Corpus("The list of texts", "texts in memory", calibration=source, evaluation=source)


def same_source(calibration: str, evaluation: str) -> bool:
    """Whether the text of two corpora comes from one source, so that a figure measured on it flatters.

    What is no corpus, such as token windows given directly, shares nothing.
    """
    try:
        source = find_corpus(calibration).calibration
        return source is not None and source.identity == find_corpus(evaluation).evaluation.identity
    except InputError:
        return False


def in_domain(calibration: str, measured: Iterable[str]) -> list[str]:
    """Return the names of the texts to measure on whose source is that of the calibration text."""
    return [name for name in measured if same_source(calibration, name.removesuffix(WITH_BOS))]


def in_domain_warning(what: str, names: Sequence[str]) -> list[str]:
    """Return a sentence for the report on each of the ``names`` that ``in_domain`` found.

    Args:
        what: The text that shares their source, such as "calibration".
        names: Of corpora, those with BOS among them.
    """
    return [
        f"{name} comes from the same source as the {what} text, so its perplexity flatters the result. Measure on "
        "another text too, such as --evaluate novel."
        for name in names
        if not name.endswith(WITH_BOS)
    ]


def _hub_corpus(name: str, path: str, config: str | None, column: str) -> Corpus:
    return Corpus(
        name,
        "a data set on the hub",
        calibration=HubSplit(path, ("train",), config=config, column=column),
        evaluation=HubSplit(path, ("test", "validation"), config=config, column=column),
        first_documents=10_000,  # test splits of a few thousand records are read whole, web crawls are not
    )


def _unknown(name: str) -> str:
    near = meant(name, CORPORA)
    hint = f" Did you mean {near!r}?" if near else ""
    return (
        f"There is no corpus {name!r}.{hint} Give one of {', '.join(CORPORA)}, the path of a text, .jsonl or .parquet "
        "file, or a hub data set (owner/name or owner/name:config)."
    )
