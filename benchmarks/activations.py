"""Perplexity of packed models with inputs in floats and in int8, a token at a time, as text is generated.

    python benchmarks/activations.py RESULT [RESULT ...] --text wikitext2_test.raw [--seqlen 512] [--limit 16]
        [--json FILE]

Prompts are multiplied in floats whatever is asked for, so windows go through the model eight at a time and one token
each, with a cache: every product is that of generation. Printed are both perplexities, the difference of the losses
paired over the windows, with its standard error, and how many layers round their inputs (those with integer levels).
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from _layers import machine, write_json
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, DynamicCache, PreTrainedModel

import sparlow
from sparlow.runtime.packed import PackedLinear
from sparlow.text import evaluation_windows

AT_ONCE = 8  # the most tokens that the kernel multiplies without decoding whole tiles


@torch.no_grad()
def losses(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """Return each window's mean loss in nats a token, (n,), computed a token at a time."""
    found = []
    for some in windows.split(AT_ONCE):
        cache, total = DynamicCache(), torch.zeros(len(some))
        for i in range(some.shape[1] - 1):
            logits = model(some[:, i : i + 1], past_key_values=cache, use_cache=True).logits[:, -1].float()
            total += functional.cross_entropy(logits, some[:, i + 1], reduction="none")
        found.append(total / (some.shape[1] - 1))
    return torch.cat(found)


def compared(folder: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one result with both kinds of inputs."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    windows = evaluation_windows(args.text, tokenizer, seqlen=args.seqlen, limit=args.limit)
    by, rounding = {}, ""
    for kind in ("float", "int8"):
        model = sparlow.load(folder, mode="packed", activations=kind, dtype=torch.float32).eval()
        by[kind] = losses(model, windows)
        layers = [module.rounds for module in model.modules() if isinstance(module, PackedLinear)]
        rounding = f"{sum(layers)} of {len(layers)}"
    apart = by["int8"] - by["float"]
    row = {kind: math.exp(loss.mean()) for kind, loss in by.items()}
    error = (apart.std() / len(apart) ** 0.5).item()
    print(
        f"{Path(folder).name}: {row['float']:.2f} with inputs in floats, {row['int8']:.2f} in int8; "
        f"loss {apart.mean():+.4f} ± {error:.4f} nats a token over {len(apart)} windows; {rounding} layers round",
        flush=True,
    )
    return {"name": Path(folder).name, **row, "difference": apart.mean().item(), "stderr": error, "rounding": rounding}


def main() -> None:
    """Measure every result that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+")
    parser.add_argument("--text", required=True)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--limit", type=int, default=16)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = [compared(folder, args) for folder in args.results]
    if args.json:
        write_json(args.json, {"machine": machine(), "seqlen": args.seqlen, "windows": args.limit, "rows": rows})


if __name__ == "__main__":
    main()
