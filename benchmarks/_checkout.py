"""What a checkout brings along to a machine where nothing can be fetched: missing packages, and which commit it is.

Such a machine often gets the files without the repository, so the folder of wheels also says which commit they are of.
"""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WHEELS = ROOT / ".wheels"
COMMIT = "commit.json"  # in it
FETCHED = ("datasets", "dill", "multiprocess", "tomli-w", "gguf")  # what the bare image lacks; its own needs included
TARGET = ("--python-version", "3.12", "--implementation", "cp", "--platform", "manylinux_2_28_x86_64")  # the image's
TESTING = ("gguf", "pytest", "hypothesis")  # what the files of tests import, beside sparlow's own needs
SOURCES = ("src", "tests", "benchmarks/*.py", "benchmarks/*.sh", "pyproject.toml")  # what a result depends on
PATIENCE = 40  # seconds for the installation


class CheckoutError(Exception):
    """The checkout cannot be used on this machine; the message says what to do."""


def fetch(root: Path = ROOT) -> None:
    """Download the wheels that a bare machine lacks, and note the commit beside them."""
    folder = root / WHEELS.name
    folder.mkdir(exist_ok=True)
    for wheel in folder.glob("*.whl"):
        wheel.unlink()
    pip = (sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", *TARGET)
    words = (*pip, "-c", root / "constraints.txt", "-d", folder, *FETCHED)
    if subprocess.run(words, check=False).returncode:  # noqa: S603 - pip, on names that stand above
        raise CheckoutError("The wheels could not be downloaded: see pip's message above.")
    note = {"commit": commit(root), "sources": digest(root)}
    (folder / COMMIT).write_text(json.dumps(note) + "\n", encoding="utf-8")


def missing(root: Path = ROOT) -> list[str]:
    """Return the packages that sparlow and its tests need and this Python lacks."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in project["dependencies"]]
    return [name for name in (*needed, *TESTING) if not _installed(name)]


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def install(names: list[str], site: Path, root: Path = ROOT) -> None:
    """Install packages, and those they bring along, from the wheels into a folder."""
    lacking = ", ".join(names)
    wheels = root / WHEELS.name
    if not any(wheels.glob("*.whl")):
        advice = "run benchmarks/device.sh --wheels where packages can be fetched, and bring the folder .wheels along"
        raise CheckoutError(f"This Python lacks {lacking}: {advice}.")
    pip = (sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile")
    wanted = list(dict.fromkeys([*names, *(name for name in FETCHED if not _installed(name))]))
    words = (*pip, "--find-links", wheels, "--target", site, *wanted)
    try:
        done = subprocess.run(words, check=False, timeout=PATIENCE)  # noqa: S603 - pip, on names of packages
    except subprocess.TimeoutExpired as error:
        raise CheckoutError(f"Installing {lacking} from .wheels took more than {PATIENCE} seconds.") from error
    if done.returncode:
        raise CheckoutError(
            f"This Python lacks {lacking}, and .wheels does not have them all: see pip's message above."
        )


def commit(root: Path = ROOT) -> str:
    """Return the commit of the sources, with ``-dirty`` if they were changed since; ``unknown`` if nothing says it."""
    if (root / ".git").exists():
        found, changed = _git(root, "rev-parse", "HEAD"), _git(root, "status", "--porcelain", "--", *SOURCES)
        if found and changed is not None:
            return found + ("-dirty" if changed else "")
    try:
        note = json.loads((root / WHEELS.name / COMMIT).read_text(encoding="utf-8"))
        return str(note["commit"]) if note["sources"] == digest(root) else "unknown"
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown"


def _git(root: Path, *words: str) -> str | None:
    git = shutil.which("git")
    if git is None:
        return None
    found = subprocess.run((git, "-C", root, *words), capture_output=True, text=True, check=False)  # noqa: S603
    return None if found.returncode else found.stdout.strip()


def digest(root: Path = ROOT) -> str:
    """Return a checksum of the sources, by which a note of the commit is known to be about them."""
    files = [root / "pyproject.toml", *(root / "benchmarks").glob("*.py"), *(root / "benchmarks").glob("*.sh")]
    files += [file for folder in ("src", "tests") for file in (root / folder).rglob("*.py")]
    total = hashlib.sha256()
    for file in sorted(files):
        total.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return total.hexdigest()
