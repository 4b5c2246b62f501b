"""Mixtures of experts: what a wide block takes, and what compressing inside experts is worth beside dropping experts.

    python benchmarks/experts.py memory [--blocks 1] [--samples 16] [--json FILE]
    python benchmarks/experts.py quality --text c4.jsonl FOLDER --work DIR [--steps 1200] [--seeds 0,1,2] [--json FILE]

``memory`` writes a mixture with random weights whose blocks have the shape of Qwen3-30B-A3B (128 experts of 768 × 2048,
eight for a token), and hands it to benchmarks/memory.py, which compresses it in a process of its own; beside the peak
stands what ``sparlow plan`` foresees.

``quality`` trains a small mixture of the same kind (_mixture.py: 22 million parameters, 8 experts a block, two for a
token) on bytes of local text and compresses its experts alone; attention stays dense. Compared are methods at equal
bits of the experts beside dropping experts, and how much an expert borrows from all tokens (0: nothing but its own,
inf: nothing of its own) at few and many calibration windows. Everything is judged on two texts that were neither
learnt nor calibrated on, one to choose by and one to report: the error of the experts' outputs on the tokens that the
dense model routes to them, the divergence from the dense model in nats a byte, and perplexity a byte. The seeds are
those of the calibration windows; every row has all of them, and the next row begins when it has. A run that was killed
goes on with the step and the row it was at; one that has no more ``--minutes`` leaves out the rows that are not whole.
"""

import argparse
import copy
import json
import math
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from _layers import machine, write_json
from _mixture import Size, Text, experts_swapped, reduce_experts, shares_of_sources, trained, usefulness
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

import sparlow
from sparlow.linalg.grid import make_grid
from sparlow.linalg.nearest import nearest
from sparlow.model.artefact.layers import SparseLowRankLinear, compressed_layers, merged
from sparlow.model.forward.decoder import Decoder
from sparlow.planning import microbenchmarks
from sparlow.planning.plan import plan
from sparlow.run import experts

BLOCKS = 48  # of Qwen3-30B-A3B
HELD_OUT = 32  # windows of each part
EFFORT = 0.2  # of the solver
CALIBRATED = 32  # windows for methods
FEW = 2  # windows: an expert sees fewer tokens than it has features
ENDS = (0.0, 0.125, math.inf)
BETWEEN = (0.03125, 0.5)
DENSE = ("*.self_attn.*",)  # what is no expert
SIXTEEN: Mapping[str, Any] = {"values": "model"}  # 16 bits, the model's type
EIGHT: Mapping[str, Any] = {"bits": 8.0, **SIXTEEN}
THREE: Mapping[str, Any] = {"bits": 3.14}
METHODS: Mapping[str, Mapping[str, Any]] = {
    "S + UV, 16-bit values, 12 bits": {"bits": 12.0, **SIXTEEN},
    "S + UV, 16-bit values, 8 bits": EIGHT,
    "S + UV, 16-bit values, 4 bits": {"bits": 4.0, **SIXTEEN},
    "--bits 8": {"bits": 8.0},
    "--bits 4.14": {"bits": 4.14},
    "--bits 3.14": THREE,
}
ROUNDED = ("int8", "int4", "int3")
LEFT = (6, 4, 2)  # experts of eight


def wide(blocks: int, vocabulary: int) -> Qwen3MoeConfig:
    """Return the config of Qwen3-30B-A3B with so many blocks and tokens."""
    config = Qwen3MoeConfig(
        vocab_size=vocabulary,
        hidden_size=2048,
        num_hidden_layers=blocks,
        head_dim=128,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=True,
    )
    config.dtype = torch.bfloat16
    config.architectures = ["Qwen3MoeForCausalLM"]
    return config


def write(config: Qwen3MoeConfig, folder: Path) -> None:
    """Write a mixture with random weights in bfloat16."""
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0) if p.ndim == 1 else p.normal_(0.0, 0.02, generator=generator)
    model.save_pretrained(folder)


@contextmanager
def in_cpu_seconds() -> Iterator[None]:
    """Within this context, the probe of a plan is timed in seconds of this process's CPU, whatever else runs here."""
    before = vars(microbenchmarks)["time"]
    vars(microbenchmarks)["time"] = SimpleNamespace(perf_counter=time.process_time)
    try:
        yield
    finally:
        vars(microbenchmarks)["time"] = before


def whole_model() -> dict[str, Any]:
    """Return what is foreseen for all of Qwen3-30B-A3B on one core: a plan reads a config and no weights."""
    torch.set_num_threads(1)  # so that seconds of the CPU are those of a clock
    with tempfile.TemporaryDirectory() as folder, in_cpu_seconds():
        wide(BLOCKS, 151936).save_pretrained(folder)
        found = plan(folder, sparlow.Recipe(samples=128, seqlen=2048), evaluate=())
    beyond = found.peak_memory["rss"] - found.baseline
    print(f"{BLOCKS} blocks, 128 × 2048 tokens, one core: {found.seconds}, {beyond / 1e9:.2f} GB", flush=True)
    return {"seconds": found.seconds, "beyond": beyond}


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of wide blocks, as measured and as foreseen; the time foreseen for the whole model."""
    from memory import GB, in_a_process

    whole = whole_model()
    with tempfile.TemporaryDirectory() as scratch:
        size = {"samples": args.samples, "seqlen": args.seqlen}
        write(wide(args.blocks, 4096), Path(scratch))
        recipe = sparlow.Recipe(rank=64, options={"max_steps": 2}, **size)
        foreseen = plan(scratch, recipe, evaluate=(), timed=False)
        given = SimpleNamespace(**size, algorithm="3basil", brief=True, option=["max_steps=2"])
        found = in_a_process(Path(scratch), given)  # type: ignore[arg-type]  # which has what is asked for
    beyond = foreseen.peak_memory["rss"] - foreseen.baseline
    found |= {"foreseen_beyond": beyond, "whole_model": whole}
    print(f"peak {found['peak'] / GB:.2f} GB, {(found['peak'] - found['libraries']) / GB:.2f} beyond the libraries,")
    print(f"of which {beyond / GB:.2f} were foreseen")
    return found


@torch.no_grad()
def log_probabilities(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """Return those of every byte but the first (windows, SEQLEN − 1, BYTES)."""
    return torch.cat([model(ids, use_cache=False).logits[:, :-1].log_softmax(-1) for ids in windows.split(8)])


class Judge:
    """Judges models beside the dense one on text that was neither learnt nor calibrated on.

    Args:
        dense: The dense model, in 32 bits.
        windows: Of the text (windows, SEQLEN).
        folder: Where the Grams of its layers lie, or are put.
    """

    def __init__(self, dense: PreTrainedModel, windows: Tensor, folder: Path) -> None:
        self._windows, self._dense = windows, log_probabilities(dense, windows)
        if not (folder / "statistics.json").exists():
            given = sparlow.Recipe(samples=len(windows), seqlen=windows.shape[1], damping=0.0, relative_damping=0.0)
            sparlow.statistics(dense, given, calibration=windows, out=folder, notify=lambda _: None)
        held_out = sparlow.Statistics(folder)
        tokens = {row["layer"]: row["tokens"] for row in held_out.table()}
        self._layers = {name: held_out[name] for name in held_out if ".experts." in name and tokens[name]}

    def __call__(self, model: PreTrainedModel) -> dict[str, float]:
        """Return the error on routed tokens (NaN where no expert is compressed), divergence and perplexity."""
        q, p = log_probabilities(model, self._windows), self._dense
        loss = functional.nll_loss(q.flatten(0, 1), self._windows[:, 1:].flatten()).item()
        divergence = functional.kl_div(q, p, reduction="sum", log_target=True).item() / p[..., 0].numel()
        return {"error": self._error(model), "divergence": divergence, "perplexity": math.exp(loss)}

    def _error(self, model: PreTrainedModel) -> float:
        """‖(W − Ŵ) X‖² / ‖W X‖² over the experts of one parameter together, and the mean of that over parameters."""
        sums: dict[str, list[float]] = {}
        for name, layer in compressed_layers(model).items():
            if name in self._layers:
                W, gram = self._layers[name]
                both = sums.setdefault(name.rpartition(".")[0], [0.0, 0.0])
                both[0] += gram.objective(W - merged(layer).weight.detach()).item()
                both[1] += gram.objective(W).item()
        return sum(left / whole for left, whole in sums.values()) / len(sums) if sums else math.nan


@contextmanager
def borrowing(share: float) -> Iterator[None]:
    """Within this context, experts borrow so many tokens for each feature; inf: they have none of their own."""
    before = experts.BORROWED
    experts.BORROWED = 1e9 if math.isinf(share) else share
    try:
        yield
    finally:
        experts.BORROWED = before


def in_32_bits(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model in 32 bits, in which everything is judged; transformers refuses this to compressed models."""
    return nn.Module.float(model)


def compressed(dense: PreTrainedModel, windows: Tensor, recipe: Mapping[str, Any]) -> tuple[PreTrainedModel, float]:
    """Return a copy whose experts are compressed, and their bits a weight."""
    model = copy.deepcopy(dense)
    given = {"samples": len(windows), "seqlen": windows.shape[1], "options": {"effort": EFFORT}, "ignore": DENSE}
    asked = sparlow.Recipe(**given, **recipe)
    report = sparlow.compress(model, asked, calibration=windows, evaluate=(), inplace=True, notify=lambda _: None)
    return in_32_bits(model), report.bits_per_weight


def borrowed(
    dense: PreTrainedModel, windows: Tensor, recipe: Mapping[str, Any], share: float
) -> tuple[PreTrainedModel, float]:
    """Return the same, where experts borrow so many tokens for each feature."""
    with borrowing(share):
        return compressed(dense, windows, recipe)


def rounded(dense: PreTrainedModel, values: str) -> tuple[PreTrainedModel, float]:
    """Return a copy whose experts are rounded to the nearest number on a grid in groups of 128, and their bits."""
    model, grid = copy.deepcopy(dense), make_grid(values, "integer")
    decoder = Decoder.of(model)
    for i in range(len(decoder)):
        for name, weight in decoder.weights(i).items():
            if ".experts." in f".{name}":
                S = nearest(weight.read(), grid).to(weight.dtype)
                weight.put(SparseLowRankLinear(S, S.new_zeros(len(S), 0), S.new_zeros(0, S.shape[1])))
    return in_32_bits(model), int(values.removeprefix("int")) + 16 / 128


def reduced(dense: PreTrainedModel, useful: Callable[[], list[Tensor]], left: int) -> tuple[PreTrainedModel, float]:
    """Return a copy in which routers choose among the most useful experts, and the bits that so many experts take."""
    model = copy.deepcopy(dense).float()
    reduce_experts(model, useful(), left)
    return model, 16 * left / model.config.num_experts


Made = Callable[[], tuple[PreTrainedModel, float]]


def cases(dense: PreTrainedModel, text: Text, seed: int) -> dict[str, Made]:
    """Return what is tried with the calibration windows of one seed, by name."""
    many, few = (text.windows(text.learnt, count, 10**6 + seed) for count in (CALIBRATED, FEW))
    found: dict[str, Made] = {name: partial(compressed, dense, many, recipe) for name, recipe in METHODS.items()}
    useful = cache(partial(usefulness, copy.deepcopy(dense).float(), many))
    found |= {f"{left} of 8 experts left": partial(reduced, dense, useful, left) for left in LEFT}
    if not seed:  # no data are looked at
        found |= {f"{values}, rounded to nearest": partial(rounded, dense, values) for values in ROUNDED}
    compared = [(EIGHT, few, share) for share in ENDS]
    compared += [(EIGHT, many, share) for share in ENDS if share != experts.BORROWED]  # which is a row of METHODS
    compared += [(THREE, few, share) for share in ENDS]
    compared += [(EIGHT, windows, share) for windows in (few, many) for share in BETWEEN]
    for recipe, windows, share in compared:
        name = f"{recipe['bits']:g} bits, {len(windows)} windows, borrowing {share:g}"
        found[name] = partial(borrowed, dense, windows, recipe, share)
    return found


def quality(args: argparse.Namespace) -> dict[str, Any]:
    """Train, compress and judge, for every seed."""
    args.work.mkdir(parents=True, exist_ok=True)
    text = Text(args.text)
    size = Size(*map(int, args.size.split(",")))
    dense = trained(text, size, (args.steps, args.schedule or args.steps), args.work / "mixture.pt").to(torch.bfloat16)
    full = copy.deepcopy(dense).float()
    parts = {name: text.windows(getattr(text, name), HELD_OUT, 1) for name in ("choosing", "reporting")}
    judges = {name: Judge(full, windows, args.work / name) for name, windows in parts.items()}
    about = {
        "parameters": sum(p.numel() for p in dense.parameters()),
        "dense": {name: judge(full)["perplexity"] for name, judge in judges.items()},
        "each token to the next expert": judges["reporting"](experts_swapped(full))["perplexity"],
        "shares of tokens": shares_of_sources(full, text),
    }
    print(json.dumps(about), flush=True)
    tried = {seed: cases(dense, text, seed) for seed in map(int, args.seeds.split(","))}
    rows = judged(tried, judges, args.work / "rows.jsonl", 60 * args.minutes)
    return about | {"rows": rows, "summary": summary(rows)}


def judged(
    tried: Mapping[int, Mapping[str, Made]], judges: Mapping[str, Judge], log: Path, seconds: float
) -> list[dict[str, Any]]:
    """Make and judge what is not in a log yet, and return the rows of all that every seed has that tries it.

    Args:
        tried: By seed and name.
        judges: By the text they judge on.
        log: Takes every row as soon as it is there.
        seconds: After which nothing more is begun.
    """
    before = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    known = {(row["seed"], row["what"]): row for row in before}
    end, whole = time.monotonic() + seconds, []
    for what in dict.fromkeys(what for own in tried.values() for what in own):
        keys = [(seed, what) for seed in tried if what in tried[seed]]
        for seed, _ in (key for key in keys if key not in known):
            if time.monotonic() < end:
                model, bits = tried[seed][what]()
                found = {name: judge(model) for name, judge in judges.items()}
                known[seed, what] = {"seed": seed, "what": what, "bits": bits, **found}
                with log.open("a") as file:
                    print(json.dumps(known[seed, what]), file=file)
        whole += [known[key] for key in keys if all(other in known for other in keys)]
    return whole


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds, on the text to report; the mean on the one to choose by."""
    found: dict[str, Any] = {}
    print(f"{'':40}  bits     error on routed tokens        nats a byte          perplexity   (error, nats: to choose)")
    for what in dict.fromkeys(row["what"] for row in rows):
        own = [row for row in rows if row["what"] == what]
        values = {
            f"{part} {key}": _spread([row[part][key] for row in own])
            for part in ("reporting", "choosing")
            for key in ("error", "divergence", "perplexity")
        }
        found[what] = {"bits": own[0]["bits"], "seeds": len(own), **values}
        cells = [f"{mean:9.5f} ± {spread:.5f}" for mean, spread in list(values.values())[:3]]
        choosing = ", ".join(f"{values[f'choosing {key}'][0]:.5f}" for key in ("error", "divergence"))
        print(f"{what:40} {own[0]['bits']:5.2f}  {'  '.join(cells)}  ({choosing})")
    return found


def _spread(values: list[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("memory", "quality"))
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=256)
    stdlib = [Path(sysconfig.get_path("stdlib"))]
    parser.add_argument("--text", type=Path, nargs="+", default=stdlib, help=".jsonl, text, or folders of .py files")
    parser.add_argument("--work", type=Path, help="folder from which a killed run goes on")
    parser.add_argument("--size", default="320,6,448", help="width, blocks, width of an expert")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--schedule", type=int, help="steps after which the rate would be zero; as many if left out")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which no case is begun")
    parser.add_argument("--json", type=Path, dest="json_file")
    args = parser.parse_args()
    if args.what == "quality" and args.work is None:
        parser.error("quality needs --work")
    found = memory(args) if args.what == "memory" else quality(args)
    if args.json_file:
        arguments = {
            name: str(value)
            for name, value in vars(args).items()
            if name not in ("json_file", "work", "text", "minutes")
        }
        write_json(args.json_file, {"machine": machine(), "arguments": arguments, "cases": found})


if __name__ == "__main__":
    main()
