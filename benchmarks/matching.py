"""What each choice in transformer matching gives: the same compressed blocks, matched in several ways.

    python benchmarks/matching.py MODEL COMPRESSED --calibration c4.jsonl --evaluate wikitext2_test.raw [--blocks 8]
        [--variants none,logits,paper] [--json FILE]

COMPRESSED is what ``sparlow compress MODEL`` wrote, without matching. For each variant its first --blocks blocks are
matched one after the other, each fed by those before it; the blocks behind them stay dense. The variants "logits…"
train all blocks together instead. Printed are the error of what leaves the last of them, relative to the dense model's
and token by token, on windows that were not trained on; the perplexity; and the seconds. Solves do not see matched
blocks here, so a whole run with --match --match-preset blocks may end lower; with the default preset it would not.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from _layers import machine, write_json
from torch import Tensor
from transformers import PreTrainedModel

import sparlow
from sparlow.evaluation.perplexity import perplexity
from sparlow.model.forward.block_pass import BlockPass, pass_through
from sparlow.model.forward.capture import Recording, capture_block_inputs
from sparlow.model.forward.decoder import Decoder
from sparlow.model.loading.source import open_model, upcast_for_cpu
from sparlow.model.training.block_matching import BlockOutputs, match
from sparlow.model.training.distillation import distill
from sparlow.model.training.loop import MicroBatches
from sparlow.model.training.packed_layer import round_through
from sparlow.recipe.training_plan import PRESETS, Training
from sparlow.text import calibration_windows, evaluation_windows

BLOCKS, LOGITS = PRESETS["blocks"], PRESETS["logits"]


def scheduled(training: Training, **changes: float) -> Training:
    """The same objective by another schedule."""
    return replace(training, plan=replace(training.plan, **changes))


def scaled(training: Training, factor: float) -> Training:
    """The same with both learning rates so many times as high."""
    return scheduled(training, lr=training.plan.lr * factor, low_rank_lr=training.plan.low_rank_lr * factor)


VARIANTS: dict[str, Training] = {
    "none": scheduled(BLOCKS, epochs=0),
    "paper": PRESETS["paper"],
    "blocks": BLOCKS,
    "own-targets": replace(BLOCKS, objective=BlockOutputs(relative=True, from_dense=False)),
    "plain-loss": replace(BLOCKS, objective=BlockOutputs(relative=False, from_dense=True)),
    "batch-8": scheduled(BLOCKS, batch=8),
    "half-rate": scaled(BLOCKS, 0.5),
    "double-rate": scaled(BLOCKS, 2),
    "six-epochs": scheduled(BLOCKS, epochs=6),
    "logits": LOGITS,
    "logits-half-rate": scaled(LOGITS, 0.5),
    "logits-double-rate": scaled(LOGITS, 2),
    "logits-one-rate": scheduled(LOGITS, low_rank_lr=LOGITS.plan.lr),
    "logits-two-epochs": scheduled(LOGITS, epochs=2),
}


@dataclass(frozen=True)
class Row:
    """One variant."""

    name: str
    error: float
    perplexity: float
    seconds: float
    epochs: int


def main() -> None:
    """Match by every variant; print a line for each."""
    args = _parser().parse_args()
    unknown = [name for name in args.variants.split(",") if name not in VARIANTS]
    if args.blocks and any(VARIANTS[name].together for name in args.variants.split(",") if name in VARIANTS):
        raise SystemExit("The variants that train all blocks together take no --blocks: leave one of them out.")
    if unknown:
        raise SystemExit(f"There is no variant {unknown[0]!r}; there is: {', '.join(VARIANTS)}.")
    opened = open_model(args.model)
    train = calibration_windows(args.calibration, opened.tokenizer, samples=args.samples, seqlen=args.seqlen, seed=0)
    text = evaluation_windows(args.evaluate, opened.tokenizer, seqlen=args.evaluate_seqlen, limit=args.limit)
    rows = []
    for name in args.variants.split(","):
        rows.append(_run(name, args, train, text))
        row = rows[-1]
        print(
            f"{name:12s} error {row.error:.5f}, perplexity {row.perplexity:.2f}, {row.epochs} epochs, "
            f"{row.seconds:.0f} s matching",
            flush=True,
        )
    if args.json:
        settings = {key: value for key, value in vars(args).items() if key not in ("json", "model", "compressed")}
        found: dict[str, Any] = {"settings": settings, "machine": machine(), "rows": [asdict(row) for row in rows]}
        write_json(args.json, found)


def _run(name: str, args: argparse.Namespace, train: Tensor, text: Tensor) -> Row:
    training = VARIANTS[name]
    plan = training.plan
    dense: Any = upcast_for_cpu(open_model(args.model).model)
    compressed: Any = upcast_for_cpu(sparlow.load(args.compressed))
    stored = open_model(args.model).model.dtype
    held_out = max(len(train) // 16, 1)
    micro_batch = min(max(4096 // args.seqlen, 1), plan.batch)
    with torch.no_grad():
        recording = capture_block_inputs(dense, train, micro_batch=micro_batch, apart=held_out)
    last = -(-held_out // micro_batch)  # micro-batches of those that are held out
    if training.together:
        return _run_together(name, dense, compressed, recording, last, text, stored)
    blocks, sparse = Decoder.of(dense).blocks, Decoder.of(compressed).blocks
    hidden = truth = recording.hidden
    seconds, epochs = 0.0, 0
    for i, calls in enumerate(recording.calls[: args.blocks]):
        with torch.no_grad():
            own = pass_through(BlockPass(blocks[i], calls, hidden))
            truth = pass_through(BlockPass(blocks[i], calls, truth))
        targets = truth if training.dense_targets else own
        start = time.perf_counter()
        if plan.epochs:
            data = MicroBatches(hidden, targets, held_out=last)
            epochs += match(BlockPass(sparse[i], calls, hidden), data, training.objective, plan, seed=i).epochs
        seconds += time.perf_counter() - start
        round_through(sparse[i], stored)
        with torch.no_grad():
            hidden = pass_through(BlockPass(sparse[i], calls, hidden))
        blocks[i] = sparse[i]
    return Row(name, _error(hidden[-last:], truth[-last:]), perplexity(dense, text).value, seconds, epochs)


def _run_together(
    name: str,
    dense: PreTrainedModel,
    compressed: PreTrainedModel,
    recording: Recording,
    last: int,
    text: Tensor,
    stored: torch.dtype,
) -> Row:
    blocks, sparse = Decoder.of(dense).blocks, Decoder.of(compressed).blocks
    truth = hidden = recording.hidden
    with torch.no_grad():
        for block, calls in zip(blocks, recording.calls, strict=True):
            truth = pass_through(BlockPass(block, calls, truth))
    data = MicroBatches(hidden, truth, held_out=last)
    done = distill(compressed, list(sparse), recording, data, VARIANTS[name].plan, seed=0)
    round_through(sparse, stored)
    with torch.no_grad():
        for block, calls in zip(sparse, recording.calls, strict=True):
            hidden = pass_through(BlockPass(block, calls, hidden))
    return Row(
        name, _error(hidden[-last:], truth[-last:]), perplexity(compressed, text).value, done.seconds, done.epochs
    )


def _error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Mean over tokens of the error relative to the token's size."""
    parts = [(x - y).square().sum(-1) / y.square().sum(-1) for x, y in zip(found, wanted, strict=True)]
    return torch.cat([part.flatten() for part in parts]).mean().item()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="the dense model: directory, hub id or .gguf file")
    parser.add_argument("compressed", help="what sparlow compress wrote from it")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="comma-separated; all by default")
    parser.add_argument("--blocks", type=int, help="how many; all by default")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--evaluate", default="builtin")
    parser.add_argument("--evaluate-seqlen", type=int, default=1024)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--json", type=Path)
    return parser


if __name__ == "__main__":
    main()
