"""The README as the package index shows it: a page of its own, because links to files hold in the repository only.

    python scripts/package_page.py    writes docs/package_page.md

Where ``project.urls`` in pyproject.toml names a Repository, links to files lead there. Until then their words stay and
the links go, and the picture gives way to its words: a link that leads nowhere helps nobody.
"""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/package_page.md"
LINK = re.compile(r"(?P<picture>!?)\[(?P<words>[^\]]+)\]\((?P<target>[^)\s]+)\)")
COMMENT = re.compile(r"^<!-- .* -->\n", re.MULTILINE)
NOTE = "\n*The pages named here are in the folder `docs` of the source distribution.*\n"


def package_page(readme: str, repository: str | None) -> str:
    """The README with links that hold anywhere.

    Args:
        readme: Its text.
        repository: Address that files lie below, if there is one.
    """

    def held(match: re.Match[str]) -> str:
        target = match["target"]
        if target.startswith(("https://", "http://", "#")):
            return match[0]
        if repository is not None:
            kind = "raw" if match["picture"] else "blob"
            return f"{match['picture']}[{match['words']}]({repository.rstrip('/')}/{kind}/HEAD/{target})"
        return f"*{match['words']}*" if match["picture"] else match["words"]

    page = LINK.sub(held, COMMENT.sub("", readme))
    return page if repository is not None else page.replace("\n## Cite\n", f"{NOTE}\n## Cite\n")


def main() -> None:
    """Write the page."""
    PAGE.write_text(current(), "utf-8")
    print(f"written to {PAGE.relative_to(ROOT)}")


def current() -> str:
    """The page as it should be now."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"].get("urls", {})
    return package_page((ROOT / "README.md").read_text("utf-8"), urls.get("Repository"))


if __name__ == "__main__":
    main()
