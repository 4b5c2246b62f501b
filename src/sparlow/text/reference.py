"""The corpus every Python has: its own language reference, `pydoc_data.topics`.

Numbers measured on it can be compared within one minor version of Python: the text changes with the language.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from sparlow.text.sources import in_order

_RULES = re.compile(r"^ *[-=*~+|]{4,}\n", re.MULTILINE)  # lines under headings and inside tables
_COMMON = 80  # characters; shorter paragraphs ("For example:") may stand in several topics
_EVALUATION_SHARE = 0.25


@dataclass(frozen=True)
class LanguageReference:
    """One part of the reference; the two parts share no paragraph longer than 80 characters.

    Attributes:
        part: Which one; `evaluation` has a quarter of the characters.
    """

    part: Literal["calibration", "evaluation"]

    def documents(self, seed: int | None = None) -> Iterator[str]:
        """See `Source.documents`; a document is a topic, and their own order is by name."""
        from pydoc_data.topics import topics

        part = split_topics(topics)[self.part]
        return in_order((part[name] for name in sorted(part)), seed)

    @property
    def identity(self) -> str:
        """See `Source.identity`; both parts are one."""
        return "Python's language reference"


def split_topics(topics: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Divide topics (name → text) into `calibration` and `evaluation`, whatever order they come in.

    Topics are taken in the order of their names' hashes, and those that still fit fill a quarter of all characters.
    """
    distinct = _without_repetition(topics)
    left = _EVALUATION_SHARE * sum(map(len, distinct.values()))
    parts: dict[str, dict[str, str]] = {"calibration": {}, "evaluation": {}}
    for name in sorted(distinct, key=lambda name: hashlib.sha256(name.encode()).digest()):
        text = distinct[name]
        fits = len(text) <= left
        left -= len(text) if fits else 0
        parts["evaluation" if fits else "calibration"][name] = text
    return parts


def _without_repetition(topics: Mapping[str, str]) -> dict[str, str]:
    """Each long paragraph once, in the longest topic that has it; topics that are mostly excerpts are left out.

    The reference prints many sections twice: `try` is a part of `compound`, `if` and `else` are the same text.
    """
    seen: set[str] = set()
    distinct = {}
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        paragraphs = _RULES.sub("", topics[name]).strip("\n").split("\n\n")
        fresh = [paragraph for paragraph in paragraphs if _normal(paragraph) not in seen]
        if 2 * sum(map(len, fresh)) < sum(map(len, paragraphs)):
            continue
        seen.update(key for key in map(_normal, fresh) if len(key) > _COMMON)
        distinct[name] = "\n\n".join(fresh)
    return distinct


def _normal(paragraph: str) -> str:
    return " ".join(paragraph.split())
