"""What the benchmarks share: real layers to solve, means, and what a time was measured on."""

import json
import math
import os
import platform
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparlow.errors import InputError
from sparlow.linalg.gram import GramAccumulator
from sparlow.machine import machine as described_machine
from sparlow.model.forward.block_pass import BlockPass, pass_through
from sparlow.model.forward.capture import capture_block_inputs
from sparlow.model.forward.compressible import compressible
from sparlow.model.forward.decoder import Decoder
from sparlow.model.forward.input_statistics import collect_statistics
from sparlow.model.loading.source import find_embedded_gguf, open_model
from sparlow.text import calibration_windows

MICRO_BATCH = 8  # windows at a time; the statistics do not depend on it


def block_layers(
    model: str | None, block: int, *, corpus: str, samples: int, seqlen: int, layers: Collection[str] = ()
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return W (out, in) and the undamped H (in, in) of the linear layers of one block, both float32.

    Args:
        model: Directory, hub id or .gguf file; None for the small model embedded in an installed package.
        block: Which block; all blocks in front of it are dense.
        corpus: Where the calibration windows come from.
        samples: How many windows.
        seqlen: Tokens in each.
        layers: Names of linears, or the last parts of such names; empty for all.

    Raises:
        InputError: There is no such model, block, layer or corpus.
    """
    opened = open_model(model or _embedded(), dtype="float32")
    if opened.tokenizer is None:
        raise InputError(f"{opened.name} has no tokenizer, so there are no calibration windows.")
    blocks = Decoder.of(opened.model).blocks
    if not 0 <= block < len(blocks):
        raise InputError(f"There is no block {block}: {opened.name} has blocks 0 to {len(blocks) - 1}.")
    weights = {n: weight.read() for n, weight in _chosen(compressible(blocks[block]), layers).items()}
    windows = calibration_windows(corpus, opened.tokenizer, samples=samples, seqlen=seqlen, seed=0)
    recording = capture_block_inputs(opened.model, windows, micro_batch=MICRO_BATCH)
    hidden = recording.hidden
    with torch.no_grad():
        for before, calls in zip(blocks[:block], recording.calls[:block], strict=True):
            hidden = pass_through(BlockPass(before, calls, hidden))
    through = BlockPass(blocks[block], recording.calls[block], hidden, f"block {block}", block)
    seen = collect_statistics(through, GramAccumulator)
    moments = {owner: statistic.second_moment(samples) for owner, statistic in seen.statistics.items()}
    return {name: (W, moments[seen.owner[name]]) for name, W in weights.items() if name in seen.owner}


def _embedded() -> str:
    file = find_embedded_gguf()
    if file is None:
        raise InputError("No embedded model is installed: name one with --model.")
    return str(file)


def _chosen(found: dict[str, nn.Linear], layers: Collection[str]) -> dict[str, nn.Linear]:
    unknown = [layer for layer in layers if not any(layer in (name, name.split(".")[-1]) for name in found)]
    if unknown:
        raise InputError(f"There is no layer {', '.join(unknown)} in this block; it has: {', '.join(found)}.")
    return {n: m for n, m in found.items() if not layers or n in layers or n.split(".")[-1] in layers}


def geometric_mean(values: Iterable[float]) -> float:
    """Return the geometric mean of positive numbers; NaN of none."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def machine() -> dict[str, Any]:
    """Describe what a time was measured on; ``load`` is what else ran in the last minute."""
    load = round(os.getloadavg()[0], 2)
    return described_machine() | {"load": load, "python": platform.python_version(), "torch": torch.__version__}


def write_json(file: Path, figures: dict[str, Any]) -> None:
    """Write figures; NaN becomes null, which JSON has, and paths become text."""
    plain = json.loads(json.dumps(figures, default=str), parse_constant=lambda _: None)
    file.write_text(json.dumps(plain, indent=1) + "\n")
