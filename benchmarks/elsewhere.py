"""Results in other programs: ``python benchmarks/elsewhere.py DIR --text wikitext2_test.raw``.

Makes an environment for ik-llama-cpp-python (a wheel; some 25 MB) outside of this one, exports DIR as GGUF in several
ways, and compares perplexity and the likeliest tokens of the same windows with those of DIR itself in float32.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

import sparlow
from sparlow.machine import machine

PACKAGE = "ik-llama-cpp-python"
FORMS = (
    {"type": "q8_0", "weights": "merged"},
    {"type": "q8_0", "weights": "sparse"},
    {"type": "f16", "weights": "merged"},
    {"type": "q4_0", "weights": "sparse"},
)
WORKER = Path(__file__).parent / "elsewhere_programs" / "llama_logits.py"


def environment(folder: Path) -> Path:
    """Make an environment that has the package, and numpy from this one; return its Python."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=False)
        (borrowed,) = {str(Path(np.__file__).parents[1])}
        (place,) = folder.glob("lib/python*/site-packages")
        (place / "borrowed.pth").write_text(f"{borrowed}\n")
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps"]
        subprocess.run([*pip, "--only-binary", ":all:", PACKAGE, "diskcache"], check=True)  # noqa: S603 - our own command
    return python


def perplexity(logits: np.ndarray, ids: torch.Tensor) -> float:
    """Of windows of tokens, each without its first."""
    likelihoods = torch.log_softmax(torch.as_tensor(logits).float()[:, :-1], -1)
    return float((-likelihoods.gather(-1, ids[:, 1:, None]).mean()).exp())


def in_llama(python: Path, folder: Path, ids: torch.Tensor, scratch: Path) -> np.ndarray:
    """Logits by ik_llama.cpp of an export."""
    np.save(scratch / "ids.npy", ids.numpy().astype(np.int32))
    adapter = [str(path) for path in [folder / "adapter.gguf"] if path.exists()]
    files = [str(folder / "model.gguf"), str(scratch / "ids.npy"), str(scratch / "logits.npy")]
    done = subprocess.run([python, WORKER, *files, *adapter], capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return np.load(scratch / "logits.npy")


def rows(options: argparse.Namespace, ids: torch.Tensor, scratch: Path) -> Iterator[dict[str, Any]]:
    """Yield what was measured of each form."""
    python = environment(options.environment)
    model = sparlow.load(options.folder, dtype=torch.float32)
    with torch.no_grad():
        ours = torch.cat([model(row[None]).logits for row in ids]).numpy()
    for form in FORMS:
        out = scratch / "-".join(form.values())
        found = sparlow.export(options.folder, out, form="gguf", options=form)
        theirs = in_llama(python, out, ids, scratch)
        same = float((ours.argmax(-1) == theirs.argmax(-1)).mean())
        numbers = {"ours": perplexity(ours, ids), "theirs": perplexity(theirs, ids), "same_token": same}
        row = {**form, **numbers, "bytes": found.bytes, "notes": found.notes}
        print(
            f"{out.name}: {row['ours']:.3f} here, {row['theirs']:.3f} there, {same:.1%} of the likeliest tokens equal"
        )
        yield row


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--environment", type=Path, default=Path(tempfile.gettempdir()) / "sparlow-elsewhere")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    tokens = AutoTokenizer.from_pretrained(given.folder)(given.text.read_text("utf-8")[:100_000]).input_ids
    text = torch.tensor(tokens[: given.windows * given.seqlen]).view(given.windows, given.seqlen)
    with tempfile.TemporaryDirectory() as where:
        measured = list(rows(given, text, Path(where)))
    if given.json:
        about = {"date": datetime.now(UTC).date().isoformat(), "machine": machine(), "sparlow": sparlow.__version__}
        about |= {"transformers": version("transformers"), "windows": given.windows, "seqlen": given.seqlen}
        given.json.write_text(json.dumps({**about, "program": PACKAGE, "rows": measured}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
