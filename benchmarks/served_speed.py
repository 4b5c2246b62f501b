"""Tokens a second in vLLM on the CPU, dense and packed, in turns; run it when nothing else runs.

    python benchmarks/served_speed.py DENSE DIR... --json benchmarks/results/served_speed.json [--rounds 2]

Each model runs in a process of its own, in bfloat16 and as vLLM compiles it by default (or not, with --eager), one
after the other and then all over again; the first text of each process does not count. A text is so many tokens
behind a prompt of twenty, which are always the same ids, so models need no tokenizer and may have random weights.
Seconds include the prompt. The environment is that of elsewhere.py; what is known so far is in the file after each
process.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from _environments import environment

import sparlow
from sparlow.machine import machine

SCRIPT = Path(__file__).parent / "elsewhere_programs" / "vllm_greedy.py"
PROMPT = [*range(1000, 1020)]


def rates_of(python: Path, folder: Path, asked: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Return what vllm_greedy.py finds, in a process of its own."""
    file, out = scratch / "asked.json", scratch / "out.json"
    file.write_text(json.dumps(asked))
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [str(python), str(SCRIPT), str(folder), str(file), str(out)]
    done = subprocess.run(words, check=False, capture_output=True, text=True, env=environ)  # noqa: S603 - our own
    if done.returncode:
        raise SystemExit(f"{folder}: {done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def about(found: dict[str, Any], given: argparse.Namespace) -> dict[str, Any]:
    """Return what belongs to all rows."""
    where = {"date": datetime.now(UTC).date().isoformat(), "machine": machine(), "sparlow": sparlow.__version__}
    where |= {"versions": found["versions"], "threads": found["threads"], "prompt_tokens": len(PROMPT)}
    return where | {name: getattr(given, name) for name in ("tokens", "rounds", "repeats", "eager")}


def row(folder: Path, rates: list[float]) -> dict[str, Any]:
    """Return what is said of a model."""
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    spread = {"slowest": min(rates), "fastest": max(rates)}
    return {"name": folder.name, "bytes": size, "per_second": statistics.median(rates), **spread, "texts": len(rates)}


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument(
        "--eager", action="store_true", help="do not let vLLM compile the model, which takes it a minute"
    )
    parser.add_argument("--environments", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    python = environment("vllm", given.environments)
    asked = {"prompts": [PROMPT], "tokens": given.tokens, "repeats": given.repeats, "windows": []}
    asked |= {"dtype": "bfloat16", "eager": given.eager}
    rates: dict[Path, list[float]] = {folder: [] for folder in given.folders}
    with tempfile.TemporaryDirectory() as where:
        for folder in given.rounds * given.folders:
            found = rates_of(python, folder, asked, Path(where))
            rates[folder] += found["per_second"][1:]
            print(f"{folder}: {found['per_second'][1:]} tokens a second", flush=True)
            if given.json:
                rows = [row(*each) for each in rates.items() if each[1]]
                given.json.write_text(json.dumps({**about(found, given), "rows": rows}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
