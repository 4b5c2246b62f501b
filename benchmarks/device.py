"""Everything that needs an accelerator, one step after the other, each within its time: benchmarks/device.sh starts it.

    benchmarks/device.sh [--out FOLDER] [--only NAME]... [--dry-run] | --wheels

Writes one JSON file, named after the card and the commit, and the steps' output beside it into FOLDER ($OUT, or
runs/device), and prints a table. A step that fails or takes too long does not stop the next. The exit code is 0 if all
went well, 1 if a step did not, 2 if nothing could be begun.

On a bare machine sparlow is taken from src, and packages that are missing there from .wheels, which --wheels fills
where packages can be fetched. --dry-run takes every step in its smallest form, on the CPU.

A new step is one more line of STEPS; all of them together may take 8 minutes.
"""

import argparse
import contextlib
import datetime as dt
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from _checkout import ROOT, CheckoutError, commit, fetch, install, missing

PROBE = (
    "import json, torch; print(json.dumps([torch.cuda.is_available() and torch.cuda.get_device_name(), {versions}]))"
)
VERSIONS = "*map(__import__('importlib.metadata').metadata.version, ('torch', 'transformers'))"
BAD = ("failed", "timed out")
TAIL = 15  # lines of a failed step's output that are shown


def figures_of(file: Path) -> dict[str, Any]:
    """Read what a benchmark measured."""
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def counts_of(file: Path) -> dict[str, Any]:
    """Count the outcomes that pytest wrote, and name the tests that failed."""
    counts: Counter[str] = Counter(passed=0, failed=0, skipped=0)
    failed = []
    for case in ET.parse(file).iter("testcase"):  # noqa: S314 - written by the step itself
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        counts[outcome] += 1
        if outcome == "failed":
            failed.append(f"{case.get('classname')}::{case.get('name')}")
    return {**counts, "names_of_failed": failed}


@dataclass(frozen=True)
class Step:
    """One thing to run.

    Attributes:
        name: Of one word, for --only.
        limit: Seconds that it may take.
        command: Words for Python; {out} stands for the file for what it measures.
        small: The same in its smallest form, on the CPU.
        read: How that file is read.
    """

    name: str
    limit: int
    command: str
    small: str
    read: Callable[[Path], dict[str, Any]] = figures_of


PYTEST = "-m pytest -v --durations=10 -m gpu -p no:cacheprovider --junitxml {out}"
LAYER = "benchmarks/accelerator.py --json {out}"
BLOCK = "benchmarks/scale.py --json {out} --compress --blocks 1"
STEPS = (
    Step("tests", 200, PYTEST, f"{PYTEST} tests/linalg/test_patterns.py", counts_of),
    Step("layer", 70, f"{LAYER} --device cuda", f"{LAYER} --device cpu --width 64 --rank 4 --effort 0.1"),
    Step(
        "block",
        150,
        f"{BLOCK} --shapes llama-3-8b --device cuda",
        f"{BLOCK} --shapes tiny --device cpu --side 64 --samples 2 --seqlen 32 --effort 0.1",
    ),
)


def run(step: Step, scratch: Path, environment: dict[str, str], *, dry: bool) -> dict[str, Any]:
    """Run a step, its output into a file in ``scratch``; return its name, status, seconds, command and figures."""
    written = scratch / f"{step.name}.out"
    command = step.small if dry else step.command
    words = [sys.executable, *(str(written) if word == "{out}" else word for word in command.split())]
    print(f"{step.name}: python {command} (at most {step.limit} s) …", flush=True)
    start = time.monotonic()
    with output_of(step, scratch).open("w") as log:
        code = _wait(words, step.limit, log, environment)
    seconds = round(time.monotonic() - start, 1)
    note, figures = "", None
    try:
        figures = step.read(written) if written.exists() else None
    except (ValueError, ET.ParseError) as error:  # half written, perhaps
        note = f"its figures cannot be read ({error})"
    status = "timed out" if code is None else "failed" if code or figures is None else "ok"
    if status == "ok" and step.read is counts_of and not figures["passed"]:
        status, note = ("skipped" if dry else "failed"), "no test was run"
    return {
        "name": step.name,
        "status": status,
        "seconds": seconds,
        "limit": step.limit,
        "command": f"python {command}",
        "note": note or _note(step, code, figures),
        "figures": figures,
    }


def output_of(step: Step, scratch: Path) -> Path:
    """Return the file with what a step prints."""
    return scratch / f"{step.name}.log"


def _note(step: Step, code: int | None, figures: dict[str, Any] | None) -> str:
    """What to know of a step beside its status."""
    if code is None:
        return f"ended after {step.limit} s"
    if figures and step.read is counts_of:
        return ", ".join(f"{figures[kind]} {kind}" for kind in ("passed", "failed", "skipped"))
    if code:
        return f"exit code {code}"
    return "no figures were written" if figures is None else ""


def _wait(words: Sequence[str], limit: float, log: IO[str], environment: dict[str, str]) -> int | None:
    """Return the exit code, or None if it took longer; nothing that it started lives on."""
    process = subprocess.Popen(  # noqa: S603 - a line of STEPS
        words,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        process_group=0,
    )
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def probe(environment: dict[str, str]) -> dict[str, str | None]:
    """Return the card's name, or None, and versions; in a process of its own, which takes its memory back with it."""
    words = (sys.executable, "-c", PROBE.format(versions=VERSIONS))
    found = subprocess.run(words, env=environment, stdout=subprocess.PIPE, check=False, text=True)  # noqa: S603
    if found.returncode:
        raise CheckoutError(f"torch does not work with {sys.executable}, see above: choose another by PYTHON.")
    card, torch, transformers = json.loads(found.stdout.splitlines()[-1])
    return {"card": card or None, "python": sys.version.split()[0], "torch": torch, "transformers": transformers}


def record_name(card: str | None, at: str) -> str:
    """Return the name of the files, without a suffix: the card and the commit."""
    commit_id, _, dirty = at.partition("-")
    words = re.sub(r"[^a-z0-9]+", "-", (card or "cpu").lower()).strip("-")
    return "-".join(part for part in (words, commit_id[:10], dirty) if part)


def table(record: dict[str, Any]) -> str:
    """Lay out the steps, one a line."""
    lines = [f"{record['card'] or 'CPU'}, torch {record['torch']}, transformers {record['transformers']}"]
    lines[0] += f", commit {record['commit']}"
    lines += [
        f"{row['name']:<12} {row['status']:<10} {row['seconds']:>6.1f} s  {row['note']}" for row in record["steps"]
    ]
    return "\n".join(line.rstrip() for line in lines)


def everything(args: argparse.Namespace, scratch: Path) -> int:
    """Run the steps, write the record after each, print the table; return the exit code."""
    environment = dict(os.environ)
    if args.dry_run:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    lacking = missing()
    if lacking:
        install(lacking, scratch / "site")
    paths = (str(ROOT / "src"), str(scratch / "site"), environment.get("PYTHONPATH", ""))
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    machine = probe(environment)
    if not machine["card"] and not args.dry_run:
        raise CheckoutError("torch finds no accelerator here: --dry-run tries the steps on the CPU.")
    started = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    record: dict[str, Any] = {"commit": commit(), **machine, "dry_run": args.dry_run, "started": started, "steps": []}
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"{record_name(record['card'], record['commit'])}.json"
    with file.with_suffix(".log").open("w", encoding="utf-8") as log, ThreadPoolExecutor() as pool:
        # nothing is timed in a dry run: its steps, most of whose time is imports, go side by side
        rows = (pool.map if args.dry_run else map)(lambda step: _one(step, args, scratch, environment), STEPS)
        for row, output in rows:
            record["steps"].append(row)
            log.write(f"== {row['name']}: {row['command']}\n{output}\n")
            log.flush()
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            partial.replace(file)
    print(f"\n{table(record)}\nwritten to {file}")
    return 1 if any(row["status"] in BAD for row in record["steps"]) else 0


def _one(
    step: Step, args: argparse.Namespace, scratch: Path, environment: dict[str, str]
) -> tuple[dict[str, Any], str]:
    """Run a step, if it is asked for, and say how it went; return its row of the record, and what it printed."""
    if args.only and step.name not in args.only:
        row = {"name": step.name, "status": "skipped", "seconds": 0.0, "limit": step.limit, "command": step.command}
        return {**row, "note": "not asked for", "figures": None}, ""
    row = run(step, scratch, environment, dry=args.dry_run)
    output = output_of(step, scratch).read_text(encoding="utf-8", errors="replace")
    last = [f"    {line}" for line in output.splitlines()[-TAIL:]] if row["status"] in BAD else []
    print("\n".join([f"{step.name}: {row['status']} after {row['seconds']:.1f} s", *last]), flush=True)
    return row, output


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(prog="benchmarks/device.sh", description=(__doc__ or "").splitlines()[0])
    default = os.environ.get("OUT") or ROOT / "runs" / "device"
    parser.add_argument("--out", type=Path, default=default, help="folder for the results (default: $OUT)")
    names = [step.name for step in STEPS]
    parser.add_argument("--only", action="append", choices=names, help="this step alone; repeatable")
    parser.add_argument("--dry-run", action="store_true", help="every step in its smallest form, on the CPU")
    parser.add_argument("--wheels", action="store_true", help="fetch what a bare machine lacks into .wheels, and end")
    args = parser.parse_args(arguments)
    args.out = Path(args.out).resolve()
    try:
        if args.wheels:
            fetch()
            return 0
        with tempfile.TemporaryDirectory() as scratch:
            return everything(args, Path(scratch))
    except CheckoutError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a step is ended with this
    sys.exit(main())
