"""Decoding beside what a user would pick instead, on one thread, all in turns.

    python benchmarks/peers.py MODEL --forms DIR1,DIR2 --text wikitext2_test.raw --json benchmarks/results/peers.json

MODEL is a dense directory, or a .gguf file. It goes to CTranslate2 in int8, and to llama.cpp (ik-llama-cpp-python, a
wheel) in several types by its own quantizer, without an importance matrix; the directories are of sparlow, packed, with
the step of the kernel, as ``sparlow generate`` runs them, and once more without rounding inputs to int8. The
perplexities are of the same windows of tokens in each program, many tokens at a time, where sparlow rounds no inputs.
Where 256 does not divide a row (576 columns of SmolLM2), llama.cpp takes other types for its K and IQ types.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from _environments import environment, versions
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparlow
from sparlow.machine import machine

SCRIPT = Path(__file__).parent / "elsewhere_programs" / "decode.py"
TYPES = ("Q8_0", "Q4_0", "Q4_K_S", "IQ3_S")
Row = dict[str, Any]


def dense(source: Path, folder: Path) -> Path:
    """Return a dense directory of the model, written if it is a .gguf file."""
    if source.suffix != ".gguf":
        return source
    if not (folder / "config.json").exists():
        model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
        model.hf_quantizer = None  # the numbers are plain ones by now
        vars(model.config).pop("quantization_config", None)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)
    return folder


def to_llama(source: Path, python: Path, scratch: Path) -> dict[str, Path]:
    """Quantise to each type; a .gguf file of the dense model is needed."""
    found = {}
    for kind in TYPES:
        found[kind] = scratch / f"{kind}.gguf"
        if found[kind].exists():
            continue
        ask = "import ik_llama_cpp as m; print(m.__path__[0] + '/bin/llama-quantize')"
        tool = subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout.strip()  # noqa: S603 - ours
        words = [tool, "--allow-requantize", str(source), str(found[kind]), kind, "1"]
        subprocess.run(words, check=True, capture_output=True)  # noqa: S603 - the program's own tool
    return found


def to_ctranslate2(source: Path, python: Path, scratch: Path) -> Path:
    """Convert to CTranslate2 in int8."""
    out = scratch / "ctranslate2-int8"
    if not out.exists():
        ask = "import sys; from ctranslate2.converters.transformers import main; main()"
        words = [str(python), "-c", ask, "--model", str(source), "--output_dir", str(out), "--quantization", "int8"]
        subprocess.run(words, check=True, env=_bare())  # noqa: S603 - ours
    return out


def _bare() -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return own | {"OMP_NUM_THREADS": "1"}


class Worker:
    """A program with a model, in a process of its own."""

    def __init__(self, program: str, model: Path, python: Path, asked: Path) -> None:
        environ = _bare() | ({"PYTHONPATH": os.environ.get("PYTHONPATH", "")} if program.startswith("sparlow") else {})
        words = [str(python), str(SCRIPT), program, str(model), str(asked)]
        self.command = " ".join(words)
        self.process = subprocess.Popen(  # noqa: S603 - ours
            words, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        files = [model] if model.is_file() else [f for f in model.iterdir() if f.suffix in (".safetensors", ".bin")]
        self.bytes = sum(file.stat().st_size for file in files)
        self._wait("ready")

    def _wait(self, wanted: str) -> str:
        for line in self.process.stdout or ():
            if line.startswith(wanted):
                return line
        raise SystemExit(f"A worker ended. See why: {self.command}")

    def ask(self, word: str) -> Any:  # noqa: ANN401 - as JSON
        """Return the answer to a word."""
        print(word, file=self.process.stdin, flush=True)
        return json.loads(self._wait("{"))

    def end(self) -> None:
        """Let it end."""
        self.process.communicate()


def workers(given: argparse.Namespace, asked: Path) -> dict[str, Worker]:
    """Start all programs, each with its model in memory."""
    pythons = {name: environment(name, given.environments) for name in ("ik_llama.cpp", "ctranslate2")}
    folder = dense(given.model, given.scratch / "dense")
    coded = to_ctranslate2(folder, pythons["ctranslate2"], given.scratch)
    found = {f"sparlow {path.name}": ("sparlow", path, Path(sys.executable)) for path in given.forms}
    found |= {f"{name}, float inputs": ("sparlow-float", *row[1:]) for name, row in [*found.items()]}
    found["CTranslate2 int8"] = "ctranslate2", coded, pythons["ctranslate2"]
    if given.model.suffix == ".gguf":
        for kind, file in to_llama(given.model, pythons["ik_llama.cpp"], given.scratch).items():
            found[f"ik_llama.cpp {kind}"] = "llama.cpp", file, pythons["ik_llama.cpp"]
    return {name: Worker(*row, asked) for name, row in found.items()}


def measured(running: Mapping[str, Worker], repeats: int) -> list[Row]:
    """Let them decode in turns, after a first time that does not count; then the perplexities."""
    answers: dict[str, list[Row]] = {name: [] for name in running}
    for i in range(repeats + 1):
        for name, worker in running.items():
            found = worker.ask("decode")
            if i:
                answers[name].append(found)
    rows = []
    for name, runs in answers.items():
        rates = sorted(run["per_second"] for run in runs)
        about = {"name": name, "bytes": running[name].bytes, "per_second": statistics.median(rates)}
        rows.append(
            {**about, "slowest": rates[0], "fastest": rates[-1], "first": statistics.median(r["first"] for r in runs)}
        )
    return rows


def write(given: argparse.Namespace, rows: list[Row]) -> None:
    """Write what is known so far."""
    if not given.json:
        return
    about: Row = {"date": datetime.now(UTC).date().isoformat(), "machine": machine(), "sparlow": sparlow.__version__}
    about["versions"] = {
        name: versions(environment(name, given.environments), name) for name in ("ik_llama.cpp", "ctranslate2")
    }
    about |= {name: getattr(given, name) for name in ("prompt_tokens", "tokens", "repeats", "windows", "seqlen")}
    given.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", "utf-8")


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--forms", type=lambda text: [*map(Path, text.split(","))], required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--environments", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "sparlow-peers")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    given.scratch.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(given.forms[0])
    tokens = tokenizer(given.text.read_text("utf-8")[:200_000]).input_ids
    windows = torch.tensor(tokens[: given.windows * given.seqlen]).view(given.windows, given.seqlen).tolist()
    asked = given.scratch / "asked.json"
    asked.write_text(
        json.dumps({"prompt": tokens[: given.prompt_tokens], "tokens": given.tokens, "windows": windows}), "utf-8"
    )
    running = workers(given, asked)
    rows = measured(running, given.repeats)
    for row in rows:
        print(f"{row['name']}: {row['per_second']:.1f} tokens a second, {row['bytes'] / 1e6:.1f} MB", flush=True)
    write(given, rows)
    for row in rows:
        row.update(running[row["name"]].ask("perplexity"))
        print(f"{row['name']}: perplexity {row['perplexity']:.2f}", flush=True)
    write(given, rows)
    for worker in running.values():
        worker.end()


if __name__ == "__main__":
    main()
