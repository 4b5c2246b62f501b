"""``sparlow.export``: a compressed model in a form that another program reads."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sparlow.errors import InputError, RunError, reason
from sparlow.exporting._registry import Exported, find
from sparlow.exporting.stored import Stored
from sparlow.files import follow_umask, human_bytes, partial_of, read_json, sync_folder, write_json
from sparlow.machine import disk_available
from sparlow.own_settings import own_settings
from sparlow.progress import Notify
from sparlow.progress.live import watched

MARK = "sparlow-export.json"  # by which a directory is known as an export, which --overwrite may replace


@own_settings()
def export(
    folder: str | Path,
    out: str | Path,
    *,
    form: str,
    options: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    notify: Notify | None = None,
) -> Exported:
    """Write a compressed model in a form that another program reads; ``sparlow export --list`` shows all forms.

    Tokenizer, chat template, generation config, processor and licence files travel along. The directory appears under
    its name when it is whole.

    Args:
        folder: A finished directory of ``compress`` or ``finetune``.
        out: Directory to write.
        form: merged, lora, compressed-tensors or gguf.
        options: Of the form, by name.
        overwrite: Replace an earlier export in ``out``.
        notify: Called after each shard; if left out, shown on a terminal and in a notebook.

    Raises:
        InputError: The model cannot be expressed in this form; why, and what to do. Nothing has been written then.
        RunError: It cannot be written.
    """
    chosen = find(form)
    given = chosen.parse_options(options or {})
    source, target = Path(folder), Path(out)
    _require_free(source, target, overwrite=overwrite)
    stored = Stored(source)
    writer = chosen.prepare(stored, **given)
    _require_space(target, writer.bytes)
    with _beside(target) as partial, watched(notify) as tell:
        found = writer.write(partial, tell)
        write_json(partial / MARK, {"form": form, "options": given, "run": stored.fingerprint})
        for inner in (partial, *(path for path in partial.rglob("*") if path.is_dir())):
            follow_umask(inner)
            sync_folder(inner)
        found.bytes = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
    found.out = target
    found.commands = [line.replace("OUT", str(target)) for line in found.commands]
    return found


def _require_free(source: Path, target: Path, *, overwrite: bool) -> None:
    """See that writing replaces nothing that is not to be replaced."""
    where, own = target.resolve(), source.resolve()
    if where in (own, *own.parents) or own in where.parents:
        raise InputError(f"{target} and {source} would lie in each other. Choose another --out.")
    parent = next(parent for parent in target.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"Cannot create {target}: {parent} is not a writable directory. Choose another --out.")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise InputError(f"{target} is no directory. Choose another --out.")
    if not target.exists() or not any(target.iterdir()):
        return
    if not (target / MARK).is_file() or "form" not in read_json(target / MARK):
        raise InputError(f"{target} is not empty and holds no export of sparlow. Choose another --out.")
    if not overwrite:
        raise InputError(f"{target} holds an export. Choose another --out, or add --overwrite to replace it.")


def _require_space(target: Path, needed: int) -> None:
    """See that the disk has room; an export that is replaced is there until the new one is whole."""
    free = disk_available(target)
    if needed > free:
        raise InputError(
            f"The export takes {human_bytes(needed)}, and {human_bytes(free)} are free for {target}. Free disk space, "
            "or choose another --out."
        )


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """Give an empty directory beside ``target`` that takes its name, unless an exception is raised."""
    partial = partial_of(target.absolute())
    lock = FileLock(partial.with_suffix(".lock"), blocking=False, fallback_to_soft=False)
    try:
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise InputError(f"Another process is writing {target}. Wait until it ends, or choose another --out.") from None
    except (OSError, NotImplementedError) as problem:
        raise InputError(f"{target.parent} cannot be written to and locked. Choose another --out.") from problem
    try:
        if partial.is_dir() and not partial.is_symlink():  # of an export that was killed
            shutil.rmtree(partial)
        partial.mkdir()
        yield partial
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
    except OSError as problem:
        raise RunError(f"Cannot write {target}: {reason(problem)}.") from problem
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
