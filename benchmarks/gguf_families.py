"""Every family that leaves as GGUF, tiny and random, in llama.cpp itself: likelihoods beside those of sparlow.

    python benchmarks/gguf_families.py [FAMILY...] [--json benchmarks/results/gguf_families.json]

Windows are as long as the file says llama.cpp may read. Compared are the logarithms of the likelihoods of all tokens
but the first, in f16, of S + U V in one file and of S with the adapter. The environment is that of elsewhere.py.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from _environments import ROOT, environment, versions
from _layers import machine, write_json

import sparlow

SCRIPT = Path(__file__).parent / "elsewhere_programs" / "llama_cpp.mjs"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "starcoder2", "gemma2", "gemma3")  # of tests/families.py
WHOLE_WINDOW = ("mistral", "phi3", "starcoder2")  # of which llama.cpp knows no local attention: within the window only
LONG, CLOSE = 24, 0.02  # tokens; largest difference of logarithms, as f16 rounds weights, keys and values


def compared(family: str, node: Path, scratch: Path) -> Iterator[dict[str, Any]]:
    """Yield a row for each of both ways to write a family."""
    tiny, results = (import_module(name) for name in ("families", "results"))  # of the tests
    ids = torch.randint(2, 100, (2, LONG), generator=torch.Generator().manual_seed(0))
    ids = ids[:, : tiny.WINDOW] if family in WHOLE_WINDOW else ids
    asked, found = scratch / "asked.json", scratch / "found.json"
    asked.write_text(json.dumps({"prompts": [], "tokens": 0, "windows": ids.tolist()}))
    results.write_result(scratch / "in", family, tokenizer=results.byte_tokenizer(), ranks=(3, 0, 9))
    with torch.no_grad():
        ours = sparlow.load(scratch / "in")(ids).logits.float().log_softmax(-1)
    ours = ours[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    for weights in ("merged", "sparse"):
        out = scratch / weights
        sparlow.export(scratch / "in", out, form="gguf", options={"type": "f16", "weights": weights})
        adapter = [out / "adapter.gguf"] if weights == "sparse" else []
        words = ["node", *map(str, (SCRIPT, out / "model.gguf", asked, found, *adapter))]
        subprocess.run(words, check=True, cwd=node, capture_output=True)  # noqa: S603 - our own script
        there = torch.tensor(json.loads(found.read_text())["likelihoods"])
        apart = (there - ours).abs().max().item()
        yield {"family": family, "weights": weights, "tokens": ids.shape[1], "apart": apart, "right": apart < CLOSE}


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=FAMILIES)
    parser.add_argument("--environments", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    node, rows = environment("llama.cpp", given.environments), []
    for family in given.families:
        with tempfile.TemporaryDirectory() as scratch:
            for row in compared(family, node, Path(scratch)):
                print(row, flush=True)
                rows.append(row)
    if given.json:
        write_json(given.json, {"machine": machine(), "versions": versions(node, "llama.cpp"), "rows": rows})
    if not all(row["right"] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
