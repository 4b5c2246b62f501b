"""MkDocs hook: a link from a page to a file elsewhere in the repository holds on the site, too.

Every file of the repository that a page links to is put into the site below ``repository/``, and so is what those
files link to. A link to a file that is not there stays as it is, and `mkdocs build --strict` refuses it.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PLACE = "repository"
ALWAYS = ("CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/LEADERBOARD.md", "benchmarks/EXPERIMENTS.md")
FENCE = re.compile(r"^[ ]*```.*?^[ ]*```[ ]*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?P<before>\]\()(?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Files, *, config: Any) -> Files:  # noqa: ANN401 - MkDocs'
    """Add the files that pages link to outside of docs/."""
    waiting = [(file.src_uri, Path(file.abs_src_path or "")) for file in files.documentation_pages()]
    waiting += [(f"{PLACE}/{name}", ROOT / name) for name in ALWAYS]
    for name in ALWAYS:
        files.append(generated(config, name))
    while waiting:
        page, path = waiting.pop()
        for target in targets(path.read_text("utf-8")):
            inside = in_repository(page, target)
            if inside is None or files.get_file_from_path(f"{PLACE}/{inside}") or not (ROOT / inside).is_file():
                continue
            files.append(generated(config, inside))
            if inside.endswith(".md"):
                waiting.append((f"{PLACE}/{inside}", ROOT / inside))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:  # noqa: ANN401 - MkDocs'
    """Point links to where their files are on the site."""
    source = page.file.src_uri

    def moved(match: re.Match[str]) -> str:
        place = place_on_site(source, match["target"])
        if place is None:
            return match[0]
        link = posixpath.relpath(place, posixpath.dirname(source) or ".")
        return f"{match['before']}{link}{match['anchor'] or ''})"

    return outside_of_code(markdown, lambda text: LINK.sub(moved, text))


def in_repository(page: str, target: str) -> str | None:
    """The path in the repository that a link leads to, if that is outside of docs/ (or if the page itself is)."""
    if ":" in target or target.startswith("/"):
        return None
    own = page.removeprefix(f"{PLACE}/") if page.startswith(f"{PLACE}/") else f"docs/{page}"
    path = posixpath.normpath(posixpath.join(posixpath.dirname(own), target))
    return None if path.startswith(("docs/", "../")) else path


def place_on_site(page: str, target: str) -> str | None:
    """Where a link leads on the site; None where it can stay."""
    inside = in_repository(page, target)
    if inside is not None:
        return f"{PLACE}/{inside}"
    if not page.startswith(f"{PLACE}/") or ":" in target or target.startswith("/"):
        return None
    own = posixpath.dirname(page.removeprefix(f"{PLACE}/"))
    return posixpath.normpath(posixpath.join(own, target)).removeprefix("docs/")


def targets(text: str) -> list[str]:
    """Targets of all links of a page, code left out."""
    return [match["target"] for match in LINK.finditer(FENCE.sub("", text))]


def outside_of_code(text: str, change: Any) -> str:  # noqa: ANN401 - a function of text
    """Change a page but for its code blocks."""
    parts, at = [], 0
    for fence in FENCE.finditer(text):
        parts += [change(text[at : fence.start()]), fence[0]]
        at = fence.end()
    return "".join([*parts, change(text[at:])])


def generated(config: Any, inside: str) -> File:  # noqa: ANN401 - MkDocs'
    """A file of the repository as one of the site."""
    return File.generated(config, f"{PLACE}/{inside}", abs_src_path=str(ROOT / inside))
