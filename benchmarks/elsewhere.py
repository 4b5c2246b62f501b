"""Results in other programs, each in an environment of its own: do they compute what sparlow computes?

    python benchmarks/packed.py MODEL --out DIR --forms int4:dense --levels integer --rank 16
    python benchmarks/elsewhere.py DIR/int4-dense --text wikitext2_test.raw --json benchmarks/results/elsewhere.json
        [--only vllm,llama.cpp] [--environments FOLDER]

Any other finished directory will do as well. Exports it in each form, and compares the logits of the same windows, or
the greedy tokens behind the same prompts, with those of the directory itself, opened by sparlow in float32. Makes the
environments under --environments, of which vLLM's takes some minutes and 2 GB; rows of programs left out by --only stay
in the file.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _environments import environment, versions
from transformers import AutoTokenizer

import sparlow
from sparlow.machine import machine

SCRIPTS = Path(__file__).parent / "elsewhere_programs"
PROMPTS = ("The capital of France is", "Once upon a time", "def add(a, b):")
TOKENS = 64
CLOSE = {
    "lora": 1e-4,
    "compressed-tensors": 1e-4,
    "merged": 5e-3,
    "gguf": 0.01,
}  # root mean square; gguf: perplexity, as in few bits
GGUF = (
    {"type": "q8_0", "weights": "merged"},
    {"type": "q8_0", "weights": "sparse"},
    {"type": "f16", "weights": "merged"},
    {"type": "q4_0", "weights": "sparse"},
)
ADAPTED = "compressed"  # name of a base with its adapter
PATIENCE = 900  # seconds for a server to be there
Row = dict[str, Any]


class ProgramError(Exception):
    """A program could not do what it was asked; what it said last."""


class Ours:
    """What sparlow itself computes with a directory, in float32."""

    def __init__(self, folder: Path, text: Path, windows: int, seqlen: int) -> None:
        self.folder = folder
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        tokens = self.tokenizer(text.read_text("utf-8")[:100_000]).input_ids
        self.ids = torch.tensor(tokens[: windows * seqlen]).view(windows, seqlen)
        self.prompts = [self.tokenizer(prompt).input_ids for prompt in PROMPTS]
        model: Any = sparlow.load(folder, dtype=torch.float32)
        with torch.no_grad():
            self.logits = torch.cat([model(row[None]).logits for row in self.ids]).numpy()
            self.tokens = [self._greedy(model, prompt) for prompt in self.prompts]
            packed = sparlow.load(folder, dtype=torch.float32, mode="packed")  # decoded numbers are not rounded there
            self.packed_tokens = [self._greedy(packed, prompt) for prompt in self.prompts]

    def _greedy(self, model: Any, prompt: list[int]) -> list[int]:  # noqa: ANN401 - a model
        found = model.generate(torch.tensor([prompt]), max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
        tokens: list[int] = found[0, len(prompt) :].tolist()
        return tokens

    def scored(self, found: Row, *, exact: bool, bound: float = CLOSE["gguf"]) -> Row:
        """Compare greedy tokens, and likelihoods of the windows, which decide where numbers were rounded."""
        expected = self.packed_tokens if exact else self.tokens
        equal = [agreeing(one, other) for one, other in zip(expected, found["tokens"], strict=True)]
        own, theirs = likelihoods(self.logits, self.ids), torch.tensor(found["likelihoods"])
        here, there = (float((-each.mean()).exp()) for each in (own, theirs))
        right = min(equal) == TOKENS if exact else abs(there / here - 1) < bound
        error = float((own - theirs).square().mean().sqrt())
        about = {"equal_tokens": equal, "of": TOKENS, "rms_of_likelihoods": error}
        return {**about, "perplexity_here": here, "perplexity_there": there, "right": right}

    def compared(self, logits: np.ndarray) -> Row:
        """Compare the logits of the windows."""
        logits = logits[..., : self.logits.shape[-1]]
        error = float(np.sqrt(((logits - self.logits) ** 2).mean() / (self.logits**2).mean()))
        same = float((self.logits.argmax(-1) == logits.argmax(-1)).mean())
        ours, theirs = perplexity(self.logits, self.ids), perplexity(logits, self.ids)
        return {"rms": error, "same_token": same, "perplexity_here": ours, "perplexity_there": theirs}


def perplexity(logits: np.ndarray, ids: torch.Tensor) -> float:
    """Of windows of tokens, each without its first."""
    return float((-likelihoods(logits, ids).mean()).exp())


def likelihoods(logits: np.ndarray, ids: torch.Tensor) -> torch.Tensor:
    """Return the logarithms (windows, tokens - 1) of the likelihoods of the tokens behind each window's first."""
    every = torch.log_softmax(torch.as_tensor(logits).float()[:, :-1], -1)
    return every.gather(-1, ids[:, 1:, None])[..., 0]


def run(python: Path, script: str, *words: object) -> None:
    """Run one of the scripts in its environment."""
    command([str(python), str(SCRIPTS / script), *map(str, words)])


def command(words: list[str], cwd: Path | None = None) -> None:
    """Run a program of its own, without what this one imports from."""
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=_bare(), cwd=cwd)  # noqa: S603 - our own
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr)
        raise ProgramError((done.stderr.strip().splitlines() or ["it said nothing"])[-1])


def _bare() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def logits_of(python: Path, script: str, ours: Ours, scratch: Path, model: Path, *more: Path) -> np.ndarray:
    """Return the logits that a program computes of the windows."""
    np.save(scratch / "ids.npy", ours.ids.numpy().astype(np.int32))
    run(python, script, model, scratch / "ids.npy", scratch / "logits.npy", *more)
    return np.load(scratch / "logits.npy")


def exported(ours: Ours, scratch: Path, form: str, **options: str) -> Path:
    """Export the directory; return where to."""
    out = scratch / "-".join([form, *options.values()])
    if not out.exists():
        sparlow.export(ours.folder, out, form=form, options=options)
    return out


def in_transformers(python: Path, ours: Ours, scratch: Path) -> Iterator[Row]:
    """Without sparlow: merged, and the two forms that have an adapter, with PEFT."""
    for form in ("merged", "lora", "compressed-tensors"):
        out = exported(ours, scratch, form)
        words = (out,) if form == "merged" else (out / "base", out)
        found = ours.compared(logits_of(python, "peft_logits.py", ours, scratch, *words[:1], *words[1:]))
        yield {"form": form, **found, "right": found["rms"] < CLOSE[form]}


def in_llama(folder: Path, ours: Ours, scratch: Path) -> Iterator[Row]:
    """GGUF by llama.cpp itself, merged or with an adapter, of each type; and whether it splits text alike."""
    texts = {"texts": PROMPTS, "prompts": ours.prompts, "tokens": TOKENS, "windows": ours.ids.tolist()}
    (scratch / "asked.json").write_text(json.dumps(texts))
    for options in GGUF:
        out = exported(ours, scratch, "gguf", **options)
        adapter = [path for path in [out / "adapter.gguf"] if path.exists()]
        words = [
            SCRIPTS / "llama_cpp.mjs",
            out / "model.gguf",
            scratch / "asked.json",
            scratch / "found.json",
            *adapter,
        ]
        command(["node", *map(str, words)], cwd=folder)
        found = json.loads((scratch / "found.json").read_text())
        row = ours.scored(found, exact=False, bound=_bound(options))
        alike = found["ids"] == ours.prompts
        about = {"form": f"gguf {' '.join(options.values())}", "release": found["release"]["release"]}
        yield {**about, **row, "same_ids": alike, "right": row["right"] and alike}


def _bound(options: Mapping[str, str]) -> float:
    """How far perplexity may be apart: S + U V in 8 bits is rounded once more, the others have the same values."""
    return 2 * CLOSE["gguf"] if options == GGUF[0] else CLOSE["gguf"]


def in_ik_llama(python: Path, ours: Ours, scratch: Path) -> Iterator[Row]:
    """GGUF, merged or with an adapter, of each type."""
    for options in GGUF:
        out = exported(ours, scratch, "gguf", **options)
        adapter = [path for path in [out / "adapter.gguf"] if path.exists()]
        found = ours.compared(logits_of(python, "llama_logits.py", ours, scratch, out / "model.gguf", *adapter))
        apart = abs(found["perplexity_there"] / found["perplexity_here"] - 1)
        yield {"form": f"gguf {' '.join(options.values())}", **found, "right": apart < _bound(options)}


def in_mlx(python: Path, ours: Ours, scratch: Path) -> Iterator[Row]:
    """The merged form."""
    found = ours.compared(logits_of(python, "mlx_logits.py", ours, scratch, exported(ours, scratch, "merged")))
    yield {"form": "merged", **found, "right": found["rms"] < CLOSE["merged"]}


def in_openvino(python: Path, ours: Ours, scratch: Path) -> Iterator[Row]:
    """The merged form, by OpenVINO's own converter."""
    found = ours.compared(logits_of(python, "openvino_logits.py", ours, scratch, exported(ours, scratch, "merged")))
    yield {"form": "merged", **found, "right": found["rms"] < CLOSE["merged"]}


def in_vllm(python: Path, ours: Ours, scratch: Path) -> Iterator[Row]:
    """The directory itself by the plug-in, eager and compiled; compressed-tensors with the adapter; the server."""
    coded, whole, merged = (exported(ours, scratch, form) for form in ("compressed-tensors", "lora", "merged"))
    cases = (
        ("the directory, by the plug-in", (ours.folder,), "float32", True),
        ("the directory, by the plug-in, compiled", (ours.folder,), "float32", False),
        ("merged", (merged,), "float32", True),
        ("lora", (whole / "base", whole), "float32", True),
        ("compressed-tensors with LoRA", (coded / "base", coded), "bfloat16", True),  # its kernel has no float32
    )
    for form, (model, *adapter), dtype, eager in cases:
        asked = {"prompts": ours.prompts, "tokens": TOKENS, "dtype": dtype, "repeats": 1, "eager": eager}
        (scratch / "asked.json").write_text(json.dumps({**asked, "windows": ours.ids.tolist()}))
        try:
            run(python, "vllm_greedy.py", model, scratch / "asked.json", scratch / "found.json", *adapter)
        except ProgramError as problem:  # one form of several
            yield {"form": form, "dtype": dtype, "problem": str(problem), "right": False}
            continue
        exact = dtype == "float32" and model == ours.folder
        yield {
            "form": form,
            "dtype": dtype,
            **ours.scored(json.loads((scratch / "found.json").read_text()), exact=exact),
        }
    yield {"form": "its HTTP server, of the directory by the plug-in", **served(python, ours, ours.folder)}
    rank = json.loads((whole / "adapter_config.json").read_text("utf-8"))["r"]
    lora = ("--enable-lora", "--max-lora-rank", rank, "--lora-modules", f"{ADAPTED}={whole}")
    yield {"form": "its HTTP server, of lora", **served(python, ours, whole / "base", *lora, name=ADAPTED)}


def agreeing(one: list[int], other: list[int]) -> int:
    """Return how many tokens two texts have in common from the start."""
    return next((i for i, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]), len(one))


def served(python: Path, ours: Ours, model: Path, *more: object, name: str | None = None) -> Row:
    """Ask vLLM's HTTP server for a completion, in float32, in which the text is known.

    Args:
        python: That of its environment.
        ours: What sparlow computes.
        model: Its directory.
        more: Further words of the command.
        name: By which the server knows what is asked for; if left out, its directory.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--model", model, "--port", port, "--dtype", "float32", "--max-model-len", 512, "--max-num-seqs", 2, *more]
    environ = _bare() | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as log:
        module = "vllm.entrypoints.openai.api_server"  # the command vllm of vllm-cpu 0.32.0 asks for a package vllm
        command = [str(python), "-m", module, *map(str, words), "--enforce-eager"]
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environ)  # noqa: S603 - our own command
        try:
            text = _completion(server, f"http://127.0.0.1:{port}", name or str(model))
        finally:
            server.terminate()
            server.wait(60)
    expected = ours.tokenizer.decode((ours.tokens if name else ours.packed_tokens)[0][:32])
    return {"dtype": "float32", "prompt": PROMPTS[0], "text": text, "right": text == expected}


def _completion(server: "subprocess.Popen[bytes]", address: str, model: str) -> str:
    asked = {"model": model, "prompt": PROMPTS[0], "max_tokens": 32, "min_tokens": 32, "temperature": 0}
    request = urllib.request.Request(f"{address}/v1/completions", json.dumps(asked).encode())  # noqa: S310 - of this machine
    request.add_header("Content-Type", "application/json")
    start = time.monotonic()
    while time.monotonic() - start < PATIENCE and server.poll() is None:
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:  # noqa: S310 - the same
                text: str = json.load(answer)["choices"][0]["text"]
                return text
        except urllib.error.URLError:
            time.sleep(2)
    return "no answer"


CHECKS = {
    "transformers": in_transformers,
    "llama.cpp": in_llama,
    "ik_llama.cpp": in_ik_llama,
    "vllm": in_vllm,
    "mlx": in_mlx,
    "openvino": in_openvino,
}


def write(path: Path, rows: list[Row], given: argparse.Namespace) -> None:
    """Put the rows of the programs that were tried in the place of earlier ones."""
    about = {"machine": machine(), "sparlow": sparlow.__version__, "model": given.folder.name}
    about["prompts"] = PROMPTS
    before = json.loads(path.read_text("utf-8"))["rows"] if path.exists() else []
    tried = {row["program"] for row in rows}
    kept = [row for row in before if row["program"] not in tried] + rows
    kept.sort(key=lambda row: [*CHECKS].index(row["program"]))
    path.write_text(json.dumps({**about, "rows": kept}, indent=1) + "\n", "utf-8")


def _rows(program: str, python: Path, ours: Ours, scratch: Path) -> Iterator[Row]:
    """Yield what was found of a program; what it could not do is the last row, and others still have their turn."""
    try:
        yield from CHECKS[program](python, ours, scratch)
    except ProgramError as problem:
        yield {"form": "", "problem": str(problem), "right": False}


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--only", default=",".join(CHECKS))
    parser.add_argument("--environments", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    ours = Ours(given.folder, given.text, given.windows, given.seqlen)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as where:
        for program in given.only.split(","):
            python = environment(program, given.environments)
            about = {"program": program, "date": datetime.now(UTC).date().isoformat()}
            about |= {"versions": versions(python, program), "windows": given.windows, "seqlen": given.seqlen}
            for row in _rows(program, python, ours, Path(where)):
                print(f"{program}: {row}", flush=True)
                rows.append({**about, **row})
            if given.json:
                write(given.json, rows, given)
    return 0 if all(row["right"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
