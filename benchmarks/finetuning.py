"""LoRA that starts from U V, beside a fresh LoRA of the same ranks, steps and text.

    python benchmarks/finetuning.py DIR --out FOLDER [--against PRUNED] [--dataset c4] [--steps 200] [--lr 1e-4,3e-4]

DIR is a directory of ``sparlow compress`` with a low-rank part. The fresh adapter is put on the S of DIR, whose U V is
left out; with --against also on a model that was only pruned, which is what fine-tuning would otherwise start from. All
have scale 1, and every start is tried with every learning rate, so that none wins by the choice of it. Writes
``finetuning.json`` and ``finetuning.svg`` into FOLDER: perplexity at the start, along the way and at the end.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from _figures import STYLE
from _layers import machine, write_json
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor

from sparlow.errors import InputError
from sparlow.evaluation.perplexity import perplexity
from sparlow.evaluation.texts import require_tokenizer
from sparlow.files import replacing
from sparlow.finetuning.examples import Examples
from sparlow.finetuning.finetune import Parent
from sparlow.finetuning.options import FinetuneOptions
from sparlow.finetuning.trainer import STAGE, train
from sparlow.machine import pick_device, versions
from sparlow.model.artefact.peft_adapter import take_apart, with_lora
from sparlow.model.loading.source import open_model, upcast_for_cpu
from sparlow.progress import Progress
from sparlow.text import evaluation_windows, training_windows

OURS, SAME, OTHER = "U V", "fresh, on the same S", "fresh, on a pruned model"
LINES = ("-", "--", ":", "-.")  # of the learning rates


@dataclass(frozen=True)
class Start:
    """Where a run starts: the directory, and whether its own U V is what the adapter starts from."""

    name: str
    folder: Path
    own: bool


@dataclass(frozen=True)
class Task:
    """What all runs share: ranks by layer, training windows, the text measured on, and how often."""

    ranks: dict[str, int]
    windows: Tensor
    text: Tensor
    points: int
    device: str


def run(start: Start, task: Task, plan: FinetuneOptions) -> dict[str, Any]:
    """Train once; perplexity is measured at step 0 and ``points`` times after."""
    model = upcast_for_cpu(open_model(str(start.folder), device=task.device).model)
    parts = take_apart(model)
    own = {name: parts[name] for name in task.ranks} if start.own else {}
    wrapped = with_lora(model, own, task.ranks, plan.seed)
    every = -(-plan.steps // task.points)
    untyped: Any = wrapped
    found = [{"step": 0, "value": perplexity(untyped, task.text).value}]
    print(f"{start.name}, lr {plan.lr:g}: {found[0]['value']:.3f} at the start", flush=True)

    def measure(step: Progress) -> None:
        if step.stage == STAGE and (step.done % every == 0 or step.done == step.total):
            found.append({"step": step.done, "value": perplexity(untyped, task.text).value})
            print(f"{start.name}, lr {plan.lr:g}: {found[-1]['value']:.3f} at step {step.done}", flush=True)

    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as checkpoints:
        loss = train(wrapped, Examples.of_windows(task.windows), plan, Path(checkpoints), measure)
    trainable = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    seconds = time.perf_counter() - begin
    return {
        "start": start.name,
        "folder": str(start.folder),
        "lr": plan.lr,
        "trainable": trainable,
        "perplexity": found,
        "loss": loss,
        "seconds": seconds,
    }


def draw(runs: Sequence[dict[str, Any]], file: Path) -> None:
    """Perplexity over steps, a colour a start and a line style a learning rate."""
    names = list(dict.fromkeys(run["start"] for run in runs))
    rates = list(dict.fromkeys(run["lr"] for run in runs))
    with rc_context(STYLE):
        figure = Figure(figsize=(6, 4))
        panel = figure.subplots()
        for found in runs:
            points = [(point["step"], point["value"]) for point in found["perplexity"]]
            color, line = f"C{names.index(found['start'])}", LINES[rates.index(found["lr"]) % len(LINES)]
            label = f"{found['start']}, lr {found['lr']:g}"
            panel.plot(*zip(*points, strict=True), marker=".", color=color, linestyle=line, label=label)
        panel.set(yscale="log", xlabel="steps", ylabel="perplexity")
        panel.legend(frameon=False)
        with replacing(file) as partial:
            figure.savefig(partial, format="svg", bbox_inches="tight", metadata={"Date": None})


def main(arguments: Sequence[str] | None = None) -> None:
    """Run every start with every learning rate; write after each run, so that little is lost."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--against", type=Path, metavar="PRUNED")
    parser.add_argument("--dataset", default="c4")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", default="1e-4,3e-4", help="separated by commas")
    parser.add_argument("--block-size", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", default="builtin", help="for perplexity")
    parser.add_argument("--limit", type=int, help="windows of it")
    parser.add_argument("--points", type=int, default=10, help="measurements after the start")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(arguments)
    named = {name: getattr(args, name) for name in ("dataset", "steps", "block_size", "batch", "accumulate", "seed")}
    plan = FinetuneOptions(**named, lr=1.0)
    try:
        task, starts = _prepare(args, plan)
    except InputError as error:
        parser.error(str(error))
    args.out.mkdir(parents=True, exist_ok=True)
    head = {"version": 1, "machine": machine(), "versions": versions(), **plan.deciding(), "text": args.text}
    head |= {"windows": len(task.windows), "measured_windows": len(task.text), "measured_tokens": task.text.shape[1]}
    del head["lr"]
    runs: list[dict[str, Any]] = []
    for lr in map(float, args.lr.split(",")):
        for start in starts:
            runs.append(run(start, task, replace(plan, lr=lr)))
            write_json(args.out / "finetuning.json", {**head, "runs": runs})
            draw(runs, args.out / "finetuning.svg")


def _prepare(args: argparse.Namespace, plan: FinetuneOptions) -> tuple[Task, list[Start]]:
    parent = Parent.read(args.folder)
    if not any(parent.ranks.values()):
        raise InputError(f"{args.folder} has no low-rank part to start from.")
    tokenizer = require_tokenizer(open_model(str(args.folder)).tokenizer, str(args.folder))
    windows = training_windows(plan.dataset, tokenizer, samples=plan.windows, seqlen=plan.block_size, seed=plan.seed)
    text = evaluation_windows(args.text, tokenizer, seqlen=plan.block_size, limit=args.limit)
    task = Task(parent.ranks_to_train(None), windows, text, args.points, pick_device(args.device))
    starts = [Start(OURS, args.folder, own=True), Start(SAME, args.folder, own=False)]
    if args.against:
        pruned = Parent.read(args.against)
        if any(pruned.ranks.values()) or not task.ranks.keys() <= pruned.ranks.keys():
            raise InputError(f"{args.against} must be the same model, only pruned.")
        starts.append(Start(OTHER, args.against, own=False))
    return task, starts


if __name__ == "__main__":
    main()
