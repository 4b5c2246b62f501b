"""Checksums that are quick to compare when a directory is opened: of its small files, and of its shards' headers.

Whole shards are compared by ``inspect --verify``. These sums already show a changed shape, type, name or setting, which
would give another model without anything looking broken.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparlow.errors import InputError
from sparlow.files import CONFIG, GENERATION, INDEX, resolve_inside, sha256

_COUNTS_LAYERS = re.compile(r"(n|num)_(\w+_)?layers?")
_LONGEST_HEADER = 100_000_000  # what safetensors itself allows


def small_sums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file that decides what a directory opens as; of a shard, that of its header."""
    found = {name: sha256(folder / name) for name in (CONFIG, GENERATION, INDEX) if (folder / name).exists()}
    return found | {file.name: header_sum(file) for file in sorted(folder.glob("*.safetensors"))}


def header_sum(file: Path) -> str:
    """Return the SHA-256 of a safetensors file's header, its length included.

    Raises:
        InputError: The file ends within it.
    """
    with file.open("rb") as stream:
        length = stream.read(8)
        size = int.from_bytes(length, "little")
        if len(length) < 8 or size > min(_LONGEST_HEADER, file.stat().st_size - 8):  # noqa: PLR2004 - of a length
            raise InputError(f"The shard {file} is damaged: its header is longer than the file.")
        return hashlib.sha256(length + stream.read(size)).hexdigest()


def require_recorded(folder: Path, recorded: Mapping[str, Any]) -> None:
    """Check that the small files and the headers are those on record.

    Args:
        folder: The directory.
        recorded: What ``small_sums`` said when it was finished; empty if nothing is on record.

    Raises:
        InputError: Names the first that is not.
    """
    for name, expected in recorded.items():
        file = resolve_inside(folder, Path(name).name)
        if not file.exists():
            raise InputError(f"{file} is missing. Restore it.")
        if (header_sum(file) if file.suffix == ".safetensors" else sha256(file)) != expected:
            raise InputError(
                f"{file} is not the one that was written. Restore it, or open the directory with transformers alone, "
                "which does not compare checksums."
            )


def require_sane(config: Any, tensors: int) -> None:  # noqa: ANN401 - what a JSON file holds
    """Check that a config has no more layers than there are tensors: its meta model is built before they are read.

    Raises:
        InputError: It does.
    """
    items = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    for name, value in items:
        if _COUNTS_LAYERS.fullmatch(str(name)) and isinstance(value, int | float) and not value <= tensors:
            raise InputError(f"{CONFIG} says {name} = {value}, but the shards hold {tensors} tensors. Restore it.")
        require_sane(value, tensors)
