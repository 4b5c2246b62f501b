"""Algorithms of others: files that a user names, and installed packages with an entry point ``sparlow.algorithms``."""

import hashlib
import importlib.util
import inspect
import sys
import warnings
from importlib.metadata import entry_points
from pathlib import Path

from sparlow.algorithms._registry import Algorithm, algorithms
from sparlow.errors import InputError, first_line

GROUP = "sparlow.algorithms"
_loaded: set[Path] = set()


def load_plugin(path: str | Path) -> None:
    """Run a Python file that registers algorithms, with ``@sparlow.pruner`` or ``@sparlow.decomposer``; once.

    Raises:
        InputError: There is no such file, it fails, or it registers nothing.
    """
    file = Path(path).expanduser().resolve()
    if file in _loaded:
        return
    if not file.is_file() or file.suffix != ".py":
        raise InputError(f"There is no Python file {path} to take algorithms from. Check the path.")
    before = len(algorithms())
    name = f"sparlow_plugin_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} cannot be imported. Give a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look themselves up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a user's code may raise
        del sys.modules[name]
        where = f"{type(error).__name__}: {first_line(error).rstrip('.')}"
        raise InputError(f"The plug-in {path} failed ({where}). Correct it, or add --debug to see where.") from error
    if len(algorithms()) == before:
        raise InputError(
            f"The plug-in {path} registers no algorithm. Put @sparlow.pruner(NAME) or @sparlow.decomposer(NAME) above "
            "a function."
        )
    _loaded.add(file)


def load_installed() -> None:
    """Import what installed packages declare; one that fails is told of and left out, as sparlow works without it."""
    for point in entry_points(group=GROUP):
        try:
            point.load()
        except Exception as error:  # noqa: BLE001 - whatever a package of others may raise
            warnings.warn(
                f"The algorithms of the installed package {point.value} are missing, because importing it failed "
                f"({type(error).__name__}: {first_line(error).rstrip('.')}). Upgrade or uninstall it.",
                RuntimeWarning,
                stacklevel=2,
            )


def revision_of(algorithm: Algorithm, own: int) -> int | str:
    """Return what tells whether an algorithm may give other bits than before: ``own`` for those of sparlow.

    For those of others their source counts, too, so that an unfinished run is not gone on with after a change.
    """
    module = algorithm.function.__module__ or ""  # none where text was executed
    if module.partition(".")[0] == "sparlow":
        return own
    try:
        source = inspect.getsource(sys.modules[module])
    except (OSError, TypeError, KeyError):  # typed into an interpreter
        return f"{own}, {module}"
    return f"{own}, {hashlib.sha256(source.encode()).hexdigest()[:16]}"
