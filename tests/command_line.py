"""The command line, called as the shell does."""

import re

import pytest

from sparlow.cli.commands import main

PROGRESS = re.compile(r"(perplexity, .*|dense perplexity|blocks|compressed perplexity|prompts): \d+ of \d+ \(.*\)")


def run(*arguments):
    """Call the command line as the shell does; return the exit code."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code or 0


def run_and_fail(capsys, *arguments, code=2):
    """Fail as promised: the code, and one line that says why; return the line."""
    capsys.readouterr()
    assert run(*arguments) == code
    shown = capsys.readouterr()
    errors = [line for line in shown.err.splitlines() if not PROGRESS.fullmatch(line)]
    assert len(errors) == 1, shown.err
    assert errors[0].startswith("error: ")
    return errors[0]
