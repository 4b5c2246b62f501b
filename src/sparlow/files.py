"""Files: written atomically, and read without trusting them; names of our files; the cache folder."""

import errno
import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from safetensors import SafetensorError

from sparlow.errors import InputError, RunError, is_out_of_memory, reason

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"  # what save_pretrained writes when one file is enough
RECORD = "sparlow.json"  # the journal, by which a directory is known as ours
CONFIG = "config.json"
HIDDEN = ".hidden"  # folder of hidden states that wait on disk, while a run goes on
GENERATION = "generation_config.json"
# What file systems say that keep directories by themselves, CIFS and FUSE among them: for files it is a fault
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF)
_LARGEST_JSON = 100_000_000  # bytes; the longest header that safetensors reads, and more than any model of today needs
_DEEPEST_JSON = 100


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path to write to. Its file is synced and renamed to ``path``, unless an exception is raised.

    The file is there and empty; in the end it has the mode that the umask gives to new files, whatever wrote it.

    Raises:
        RunError: It cannot be written.
    """
    partial = partial_of(path)
    try:
        partial.unlink(missing_ok=True)  # of a run that was killed, or a link that leads elsewhere
        mode = _create(partial)
        yield partial
        _set_mode(partial, mode)
        _sync(partial)
        partial.replace(path)
        _sync(path.parent)
    except (OSError, SafetensorError) as problem:
        if is_out_of_memory(problem):  # no fault of the disk
            raise
        raise RunError(f"Cannot write {path}: {reason(problem)}.") from problem
    finally:
        partial.unlink(missing_ok=True)


def partial_of(path: Path) -> Path:
    """Return the temporary path of a file that is being written."""
    return path.with_name(f".{path.name}.partial")


def _create(path: Path) -> int:
    """Make an empty file where there is none, not even a link; return the mode that the umask gives it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)


def _set_mode(path: Path, mode: int) -> None:
    if stat.S_IMODE(path.stat().st_mode) != mode:
        path.chmod(mode)


def follow_umask(folder: Path) -> None:
    """Give every file in a directory the mode of a new one: safetensors and others write for their owner only."""
    probe = folder / ".mode.partial"
    probe.unlink(missing_ok=True)
    mode = _create(probe)
    probe.unlink()
    for path in folder.iterdir():
        if path.is_file() and not path.is_symlink():
            _set_mode(path, mode)


def sync_folder(folder: Path) -> None:
    """Sync every file of a directory to disk, before another file there declares them complete."""
    for path in folder.iterdir():
        if path.is_file() and not path.is_symlink():
            _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    folder = path.is_dir()
    if os.name == "nt" and folder:  # directories cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as problem:
        if not folder or problem.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: Any, *, indent: int = 1) -> None:  # noqa: ANN401 - anything JSON holds
    """Write a JSON file atomically. Numbers that are not finite become text, because JSON has none.

    Raises:
        RunError: It cannot be written.
    """
    with replacing(path) as partial:
        partial.write_text(as_json(content, indent=indent), encoding="utf-8")


def as_json(content: Any, *, indent: int = 1) -> str:  # noqa: ANN401 - anything JSON holds
    """Return the text of a JSON file that every strict reader takes."""
    return json.dumps(plain(content), indent=indent, allow_nan=False) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a model's directory.

    Raises:
        InputError: There is none, it is a link that leads elsewhere, or ``parse_json`` refuses it.
    """
    return parse_json(resolve_inside(path.parent, path.name))


def parse_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, wherever it is; its size and depth are bounded.

    Raises:
        InputError: There is none, or it is larger or deeper than any file of a model.
    """
    if path.exists() and not path.is_file():  # opening a pipe would wait
        raise InputError(f"{path} is no file. Restore it.")
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST_JSON + 1)
        content = json.loads(data.decode("utf-8")) if len(data) <= _LARGEST_JSON else None
    except FileNotFoundError as problem:
        raise InputError(f"{path} is missing, so {path.parent} is not a finished model of sparlow.") from problem
    except (OSError, ValueError, RecursionError) as problem:
        raise InputError(f"{path} cannot be read ({reason(problem)}). Restore it.") from problem
    if len(data) > _LARGEST_JSON:
        raise InputError(f"{path} is larger than {_LARGEST_JSON:,} bytes, which no file of a model is. Restore it.")
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold one JSON object. Restore it.")
    level: list[Any] = [content]
    for _ in range(_DEEPEST_JSON):
        items = (item for part in level for item in (part.values() if isinstance(part, dict) else part))
        level = [item for item in items if isinstance(item, dict | list)]
    if level:
        raise InputError(f"{path} is nested more than {_DEEPEST_JSON} deep, which no file of a model is. Restore it.")
    return content


def require_printable(name: str) -> None:
    """See that a name that a file gives can be shown.

    Raises:
        InputError: It has control characters, which could forge what a terminal shows.
    """
    if not name.isprintable():
        raise InputError(
            f"The name {name!r} has control characters, as no tensor, layer or file of a model does. Restore it."
        )


def plain(value: Any) -> Any:  # noqa: ANN401 - anything JSON holds
    """Return ``value`` for JSON, with text for what is not finite, such as the perplexity of a ruined model."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def shard_filename(file: Any) -> str:  # noqa: ANN401 - what a JSON file holds
    """Return the name of a safetensors file if it has no directory part.

    Raises:
        InputError: It could be outside of the model's directory, or is no safetensors file.
    """
    name = str(file)
    require_printable(name)
    if PurePosixPath(name).name == name == PureWindowsPath(name).name and name.endswith(".safetensors"):
        return name
    raise InputError(f"{file!r} is not the name of a safetensors file in the model's directory.")


def resolve_inside(folder: Path, name: str) -> Path:
    """Return the path of a file in a directory.

    Raises:
        InputError: It is a link that leads elsewhere; a cache of the hub may lead to its own store of files.
    """
    path, home = folder / name, folder.resolve()
    store = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if path.is_symlink() and path.resolve().parent not in (home, store):
        raise InputError(
            f"{path} is a link that leads out of the model's directory. Copy the directory with cp -L -r, which puts "
            "the files themselves in the place of links."
        )
    return path


def is_unfinished(folder: Path) -> bool:
    """Whether a directory holds a run of ours that has not come to its end."""
    if (folder / CONFIG).is_file() or not (folder / RECORD).is_file():
        return False
    return not parse_json(folder / RECORD).get("finished")


def cache_folder() -> Path:
    """Return the folder of converted models: $SPARLOW_CACHE, $XDG_CACHE_HOME/sparlow or ~/.cache/sparlow."""
    own = os.environ.get("SPARLOW_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparlow"


def human_bytes(size: float) -> str:
    """Return bytes as text: in GB of 10⁹ bytes, below one in MB of 10⁶, and below 0.1 of these in KB of 10³."""
    if size >= 1e9:  # noqa: PLR2004 - a gigabyte
        return f"{size / 1e9:.2f} GB"
    if 0 < size < 1e5:  # noqa: PLR2004 - 0.1 MB
        return f"{size / 1e3:.1f} KB"
    return f"{size / 1e6:.1f} MB"
