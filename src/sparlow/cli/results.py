"""``--json``: the result of a command for programs, in a file or, with a hyphen, on standard output."""

from pathlib import Path
from typing import Any

from sparlow.cli import waiting
from sparlow.cli.leaving import speaks
from sparlow.errors import InputError

STANDARD_OUTPUT = Path("-")


def require_place(file: Path | None) -> None:
    """Check before the work that its result can be written."""
    if file not in (None, STANDARD_OUTPUT) and not file.parent.is_dir():
        raise InputError(f"There is no directory {file.parent} for --json {file.name}. Create it first.")


def put(file: Path | None, content: Any) -> None:  # noqa: ANN401 - anything JSON holds
    """Write a result, if that is asked for; of several processes one is enough."""
    from sparlow.files import as_json, write_json

    if not speaks():
        return
    if file == STANDARD_OUTPUT:
        waiting.end()
        print(as_json(content, indent=2), end="")  # noqa: T201 - for a program
    elif file is not None:
        write_json(file, content, indent=2)
