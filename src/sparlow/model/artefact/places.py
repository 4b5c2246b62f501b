"""Names that files say of other files: none may lead out of the directory that is read."""

from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from sparlow.errors import InputError


def shard_filename(file: Any) -> str:  # noqa: ANN401 - what a JSON file holds
    """Return the name of a safetensors file if it has no directory part.

    Raises:
        InputError: it could be outside of the model's directory, or is no safetensors file.
    """
    name = str(file)
    if PurePosixPath(name).name == name == PureWindowsPath(name).name and name.endswith(".safetensors"):
        return name
    raise InputError(f"{file!r} is not the name of a safetensors file in the model's directory")


def resolve_inside(folder: Path, name: str) -> Path:
    """Return the path of a file in a directory.

    Raises:
        InputError: it is a link that leads elsewhere; a cache of the hub may lead to its own store of files.
    """
    path, home = folder / name, folder.resolve()
    store = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if path.is_symlink() and path.resolve().parent not in (home, store):
        raise InputError(f"{path} is a link that leads out of the model's directory")
    return path
