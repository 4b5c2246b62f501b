"""The prose that comes with sparlow, for evaluation: the first six chapters of Jane Austen's Persuasion (1817).

Jane Austen died in 1817, so the text is in the public domain everywhere. It is the one in the R package janeaustenr
(Debian: r-cran-janeaustenr), from Project Gutenberg, each paragraph in one line and without marks of emphasis.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sparlow.text.sources import in_order

FILE = Path(__file__).with_name("novel.txt")


@dataclass(frozen=True)
class Novel:
    """The chapters as one document."""

    def documents(self, seed: int | None = None) -> Iterator[str]:
        """See `Source.documents`."""
        return in_order([FILE.read_text("utf-8")], seed)

    @property
    def identity(self) -> str:
        """See `Source.identity`."""
        return "the novel"
