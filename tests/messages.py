"""All that sparlow says, with file and line, on one page: ``python tests/messages.py [KIND …]`` prints it.

It is found in the syntax tree, so what stands in braces is the expression that fills the place. The words before what
another program says are listed as "foreign", and a sentence that a function gives to the place where it is raised or
printed as "other".
"""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("error", "foreign", "warning", "help", "progress", "print", "other")
CALLS = {
    **dict.fromkeys(("InputError", "RunError", "ArgumentTypeError"), "error"),
    **dict.fromkeys(("Progress", "_stage", "counting", "perplexity"), "progress"),
    "as_input_error": "foreign",
    "Doc": "help",
    "print": "print",
}
SECOND = ("counting", "perplexity")  # calls that take the words as the second argument, or as the first
WORDS = 4  # of a string that is a sentence, wherever it stands


class Message(NamedTuple):
    """One message, and where it stands."""

    kind: str
    where: str
    text: str


@cache
def messages() -> tuple[Message, ...]:
    """Return every message of the package and of run.py, in the order of the files."""
    files = [*sorted((ROOT / "src" / "sparlow").rglob("*.py")), ROOT / "run.py"]
    return tuple(message for file in files for message in _of(file))


def _of(file: Path) -> Iterator[Message]:
    tree = ast.parse(file.read_text())
    seen = {id(node) for text in _docstrings(tree).values() for node in ast.walk(text)}
    for kind, node in (*_help_of_commands(tree), *_by_purpose(tree), *(("other", n) for n in ast.walk(tree))):
        text = text_of(node)
        if text is None or (kind == "other" and (id(node) in seen or len(text.split()) < WORDS)):
            continue
        seen |= {id(inner) for inner in ast.walk(node)}
        yield Message(kind, f"{file.relative_to(ROOT)}:{node.lineno}", " ".join(text.split()))


def _docstrings(tree: ast.Module) -> dict[ast.AST, ast.expr]:
    """Return the docstring of each module, class and function that has one."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    bodies = [node for node in ast.walk(tree) if isinstance(node, kinds) and ast.get_docstring(node)]
    return {node: node.body[0].value for node in bodies}


def _help_of_commands(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    for node, text in _docstrings(tree).items():
        decorators = getattr(node, "decorator_list", [])
        if any("command" in ast.unparse(decorator) for decorator in decorators):
            yield "help", text


def _by_purpose(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    """Find the strings whose purpose is seen from the call, or from the name they are given."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield from _of_call(node)
        elif isinstance(node, ast.FunctionDef) and "warnings" in node.name:
            inner = [n for n in ast.walk(node) if isinstance(n, ast.Yield | ast.Return | ast.List)]
            for found in inner:
                values = found.elts if isinstance(found, ast.List) else [found.value]
                yield from (("warning", value) for value in values if value is not None)
        elif isinstance(node, ast.Assign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any("warnings" in ast.unparse(target) for target in targets):
                yield from (("warning", n) for n in getattr(node.value, "elts", ()))


def _of_call(call: ast.Call) -> Iterator[tuple[str, ast.expr]]:
    called = ast.unparse(call.func)
    name = called.rpartition(".")[2]
    kind = "warning" if called.endswith(("warnings.append", "warnings.warn")) else CALLS.get(name)
    if kind:
        yield from ((kind, value) for value in call.args[: 2 if name in SECOND else 1])
    for keyword in call.keywords:
        if keyword.arg in {"help", "epilog"}:
            yield "help", keyword.value
        elif keyword.arg in {"before", "after"} and name == "labelled":
            yield "progress", keyword.value


def text_of(node: ast.AST) -> str | None:
    """Return what an expression says, ``{…}`` for what only the run knows; None if it is no string."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or "" for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return f"{{{ast.unparse(node.value)}}}"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        sides = text_of(node.left), text_of(node.right)
        if sides == (None, None):
            return None
        return "".join(
            f"{{{ast.unparse(side)}}}" if text is None else text
            for side, text in zip((node.left, node.right), sides, strict=True)
        )
    return None


if __name__ == "__main__":
    for kind in sys.argv[1:] or KINDS:
        lines = [f"{message.where}: {message.text}" for message in messages() if message.kind == kind]
        sys.stdout.write("\n".join([f"# {kind}", *lines, ""]))
