"""Find tasks by name: the user's own files first, then lm-eval's, without parsing all of these for one name."""

import difflib
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from textwrap import shorten
from typing import Any

from sparlow.errors import InputError

_NAMED = re.compile(r"""^["']?(task|group|tag)["']? *: +["']?([^\s"'#\[]+)["']? *$""", re.MULTILINE)


class Catalogue:
    """The tasks that can be asked for.

    Args:
        path: The user's directory of task files (.yaml); a name in it goes before the same name of lm-eval.

    Raises:
        InputError: The package lm-eval is missing, or the directory or a file in it cannot be read.
    """

    def __init__(self, path: str | Path | None) -> None:
        try:
            import accelerate  # noqa: F401 - lm-eval imports it to run a local model
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise InputError(
                f"Tasks need lm-eval, and {error.name or error} is missing. Run: pip install 'sparlow[eval]'"
            ) from error
        self._path = None if path is None else _readable(Path(path))
        self._own = TaskManager(include_path=self._path, include_defaults=False)

    @cached_property
    def _stock(self) -> tuple[dict[str, Path], set[str], str]:
        """lm-eval's tasks with their files; most of its tasks, groups and tags; and all its files' text.

        Its own index parses 14,000 files, half a minute on a slow machine; a look for lines with names takes a second.
        """
        import lm_eval.tasks

        files: dict[str, Path] = {}
        names, texts = set(), []
        for file in sorted(Path(lm_eval.tasks.__file__).parent.rglob("*"), key=lambda file: file.as_posix()):
            if file.suffix in (".yaml", "") and file.is_file():  # those without ending are included by others
                texts.append(file.read_text("utf-8", errors="replace"))
                for kind, name in _NAMED.findall(texts[-1]):
                    names.add(name)
                    if kind == "task" and file.suffix:
                        files.setdefault(name, file)
        return files, names, "\n".join(texts)

    @cached_property
    def _whole(self) -> Any:  # noqa: ANN401 - a TaskManager, of a library imported only here
        """lm-eval's own index of everything, the user's directory before it."""
        from lm_eval.tasks import TaskManager

        return TaskManager(include_path=self._path)

    def require(self, names: Sequence[str]) -> None:
        """Raise InputError at the first name that is unknown; no data is fetched."""
        for name in names:
            if name in self._own.task_index:
                continue
            _, known, text = self._stock
            if name in known or (name in text and name in self._whole.task_index):
                continue
            near = difflib.get_close_matches(name, {*self._own.task_index, *known}, n=5)
            meant = f" Did you mean {', '.join(near)}?" if near else ""
            raise InputError(f"There is no task {name!r}.{meant} List all of them with: lm-eval ls tasks")

    def load(self, name: str) -> list[Any]:
        """Fetch the data of what is called ``name``: one task, one group with its tasks, or the tasks with that tag.

        Returns:
            lm-eval's ``Task`` and ``Group`` objects.
        """
        try:
            if self._is_own(name):
                found = self._own.load([name])
            elif name not in self._own.task_index and name in self._stock[0]:
                found = self._own.load([str(self._stock[0][name])])
            else:
                found = self._whole.load([name])
        except Exception as error:  # task files hold code, and datasets and the hub's client share no base class
            reason = shorten(f"{type(error).__name__}: {error}", 200, placeholder=" …")
            raise InputError(
                f"The task {name!r} cannot be loaded ({reason}). Check its files, or the connection if its data comes "
                "from the hub."
            ) from error
        groups = list(found["groups"].values())  # the one that was asked for, then its subgroups
        return groups[:1] or list(found["tasks"].values())

    def _is_own(self, name: str) -> bool:
        """Whether the user's directory defines ``name`` and, of a group, all that it names."""
        entry = self._own.task_index.get(name)
        if entry is None:
            return False
        members = (entry.cfg or {}).get("task")
        if not isinstance(members, list):
            return True
        return all(isinstance(member, str) and self._is_own(member) for member in members)


def _readable(path: Path) -> Path:
    """Return the directory after checking its files, because lm-eval skips those that it cannot read."""
    from lm_eval.tasks._yaml_loader import load_yaml

    if not path.is_dir():
        raise InputError(f"{path} is not a directory. Give --task-path a directory with task files (.yaml).")
    files = sorted(path.rglob("*.yaml"))
    if not files:
        raise InputError(f"{path} holds no task file (.yaml). Give --task-path another directory.")
    for file in files:
        try:
            load_yaml(file, resolve_func=False)
        except Exception as error:  # yaml's errors, missing files, cycles of inclusion
            reason = shorten(str(error), 200, placeholder=" …")
            raise InputError(f"The task file {file} cannot be read: {reason}. Mend it, or move it away.") from error
    return path
