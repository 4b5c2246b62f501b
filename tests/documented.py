"""The code blocks of README.md and docs/, as tests/docs reads and runs them."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
GENERATED = ("options.md", "package_page.md")  # from the declarations, and from the README
FENCE = re.compile(
    r"(?:^<!-- not run here: (?P<why>[^\n]*?) -->\n)?"
    r"^(?P<indent>[ ]*)```(?P<language>\w*)[ ]*\n(?P<text>.*?)^(?P=indent)```[ ]*$",
    re.MULTILINE | re.DOTALL,
)
RUN = ("", "bash", "python")
VARIABLE = re.compile(r"[A-Z_]+=\S+")
PROGRAMS = (("sparlow",), ("python", "run.py"))


@dataclass(frozen=True)
class Block:
    """A fenced block: where it begins, its language, what is in it, and why it is not run, if it says so."""

    line: int
    language: str
    text: str
    why: str | None

    @property
    def commands(self):
        """The words of each command: lines joined, comments and variables of the environment left out."""
        lines = self.text.replace("\\\n", " ").splitlines()
        words = [shlex.split(line, comments=True) for line in lines]
        return [without_variables(each) for each in words if each]

    @property
    def unknown(self):
        """The commands that nothing here can run."""
        return [words for words in self.commands if not any(tuple(words[: len(p)]) == p for p in PROGRAMS)]


def without_variables(words):
    """A command without the variables in front of it."""
    while words and VARIABLE.fullmatch(words[0]):
        words = words[1:]
    return words


def pages():
    """Paths of the pages whose blocks are run, from the root."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [path.relative_to(ROOT).as_posix() for path in found if path.name not in GENERATED]


def blocks(page):
    """The fenced blocks of a page, in order."""
    text = (ROOT / page).read_text("utf-8")
    return [
        Block(text.count("\n", 0, match.start()) + 1, match["language"], match["text"], match["why"])
        for match in FENCE.finditer(text)
    ]


def runnable(page):
    """The blocks of a page that are run."""
    return [block for block in blocks(page) if block.language in RUN and block.why is None]
