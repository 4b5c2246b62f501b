"""The output directory: whether it may be written to, and by one process at a time."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from sparlow.errors import InputError
from sparlow.files import HIDDEN, RECORD, partial_of, read_json

NAME = RECORD
LOCK = ".sparlow.lock"  # there only while a process writes, or after one that was killed; the lock itself dies with it
_BEFORE_THE_FIRST_RECORD = {LOCK, HIDDEN, partial_of(Path(NAME)).name}  # what a run leaves that is killed so early
_WRITTEN_BY_SAFETENSORS = re.compile(r"\.tmp\w{6}")  # it writes every file under such a name, then renames it
_KEYS = {"format", "finished", "fingerprint", "blocks_name", "dense", "shards", "blocks"}


@contextmanager
def claimed(folder: Path, *, overwrite: bool, finished: bool = False) -> Iterator[None]:
    """Check ``folder`` as ``check_folder`` does, make it, and keep every other process out of it.

    What a killed run has left is removed: hidden states, and a shard that was being written. A directory that is still
    empty at the end is removed again.

    Raises:
        InputError: It may not be written to, cannot be locked, or another process writes there.
    """
    check_folder(folder, overwrite=overwrite, finished=finished)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, blocking=False, fallback_to_soft=False)  # a soft lock outlives its owner
        lock.acquire()
    except Timeout:
        raise InputError(
            f"Another process is writing to {folder}. Wait until it ends, or choose another --out."
        ) from None
    except (OSError, NotImplementedError) as error:
        raise InputError(f"{folder} cannot be written to and locked ({error}). Choose another --out.") from error
    try:
        _remove_leftovers(folder)
        yield
    finally:
        shutil.rmtree(folder / HIDDEN, ignore_errors=True)
        with suppress(OSError):  # removed while it is held; where that is not possible it does no harm
            (folder / LOCK).unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):  # not empty: the rule
            for path in made:
                path.rmdir()


def _remove_leftovers(folder: Path) -> None:
    """Remove what only a run that was killed leaves; nobody else writes here now."""
    shutil.rmtree(folder / HIDDEN, ignore_errors=True)
    for path in folder.iterdir():
        if _WRITTEN_BY_SAFETENSORS.fullmatch(path.name) and path.is_file():
            with suppress(OSError):
                path.unlink()


def check_folder(folder: Path, *, overwrite: bool, finished: bool = False) -> None:
    """See that ``folder`` may be written to: new, empty, an unfinished run, or any run of sparlow.

    Args:
        folder: The output directory.
        overwrite: A finished run may be replaced.
        finished: A finished run may be there, and stays as it is.

    Raises:
        InputError: It holds a finished result that is not wanted, or something that is not sparlow's.
    """
    if not folder.exists():
        parent = next(parent for parent in folder.absolute().parents if parent.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise InputError(f"Cannot create {folder}: {parent} is not a writable directory. Choose another --out.")
        return
    if not folder.is_dir():
        raise InputError(f"{folder} is a file. Give a directory with --out.")
    if {path.name for path in folder.iterdir()} <= _BEFORE_THE_FIRST_RECORD:
        return
    found = read_json(folder / NAME) if (folder / NAME).exists() else {}
    if not found.keys() >= _KEYS:
        raise InputError(f"{folder} is not empty and holds no run of sparlow. Choose another --out.")
    if found["finished"] and not (overwrite or finished):
        raise InputError(f"{folder} holds a finished result. Choose another --out, or add --overwrite to replace it.")
