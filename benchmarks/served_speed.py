"""Tokens a second in vLLM on the CPU, dense and packed, in turns; run it when nothing else runs.

    python benchmarks/served_speed.py DENSE DIR... --json benchmarks/results/served_speed.json

Each model runs in a process of its own, in bfloat16 and as vLLM compiles it by default, one after the other and then
all over again; the first text of each process does not count. The environment is that of elsewhere.py.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from _environments import environment
from transformers import AutoTokenizer

import sparlow
from sparlow.machine import machine

SCRIPT = Path(__file__).parent / "elsewhere_programs" / "vllm_greedy.py"
PROMPT = "Once upon a time, in a small village at the foot of the mountains, there lived an old clockmaker"


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--environments", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    python = environment("vllm", given.environments)
    prompt = AutoTokenizer.from_pretrained(given.folders[-1])(PROMPT).input_ids
    asked = {"prompts": [prompt], "tokens": given.tokens, "repeats": given.repeats, "windows": []}
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    rates: dict[str, list[float]] = {str(folder): [] for folder in given.folders}
    with tempfile.TemporaryDirectory() as where:
        file, out = Path(where) / "asked.json", Path(where) / "out.json"
        file.write_text(json.dumps({**asked, "dtype": "bfloat16", "eager": False}))
        for _ in range(given.rounds):
            for folder in rates:
                words = [str(python), str(SCRIPT), folder, str(file), str(out)]
                subprocess.run(words, check=True, capture_output=True, env=environ)  # noqa: S603 - our own
                found = json.loads(out.read_text())
                rates[folder] += found["per_second"][1:]
                print(f"{folder}: {found['per_second'][1:]}", flush=True)
    rows = [
        {"name": Path(name).name, "per_second": statistics.median(each), "slowest": min(each), "fastest": max(each)}
        for name, each in rates.items()
    ]
    for row in rows:
        print(f"{row['name']}: {row['per_second']:.1f} tokens a second")
    if given.json:
        about = {"date": datetime.now(UTC).date().isoformat(), "machine": machine(), "sparlow": sparlow.__version__}
        about |= {"versions": found["versions"], "threads": found["threads"], "prompt_tokens": len(prompt)}
        about |= {"tokens": given.tokens, "rounds": given.rounds, "repeats": given.repeats}
        given.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
