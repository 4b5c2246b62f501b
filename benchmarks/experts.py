"""Mixtures of experts: what a wide block takes, and what compressing inside experts is worth beside dropping experts.

    python benchmarks/experts.py memory [--blocks 1] [--samples 16] [--json FILE]
    python benchmarks/experts.py quality [--text FOLDER] [--steps 1500] [--seeds 0,1,2] [--windows 4,32] [--json FILE]

``memory`` writes a mixture with random weights whose blocks have the shape of Qwen3-30B-A3B (128 experts of 768 × 2048,
eight for a token), and hands it to benchmarks/memory.py, which compresses it in a process of its own; beside the peak
stands what ``sparlow plan`` foresees. ``quality`` trains a small mixture of the same kind (8 experts, two for a token)
on bytes of local text, with the usual loss that spreads tokens over experts, and compares on text that it never saw, by
the divergence from the dense model in nats a byte: methods at equal bits; how much an expert borrows from all tokens
(0: nothing but its own, inf: nothing of its own), at few and many calibration windows; and dropping experts.

Dropped are the experts of least mean router weight · |output| over the tokens routed to them (REAP, Lasby et al., 2025,
arXiv 2510.13999, from its description), in every block alike; the router chooses among those that are left.
"""

import argparse
import copy
import json
import math
import sysconfig
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from _layers import machine, write_json
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

import sparlow
from sparlow.run import experts

SEQLEN = 256
BYTES = 256  # tokens there are
HELD_OUT = 48  # windows
BORROWED = (0.0, 0.03125, 0.125, 0.5, 2.0, math.inf)
METHODS = {  # at about the bits of the second column
    "wanda 16:32": (9.0, {"algorithm": "wanda", "pattern": "16:32", "rank": 0}),
    "3basil 13:32, rank 8": (9.0, {"pattern": "13:32", "rank": 8}),
    "--bits 8": (8.0, {"bits": 8.0}),
    "--bits 4.5": (4.5, {"bits": 4.5}),
}


def wide(blocks: int, folder: Path) -> None:
    """Write a mixture with random weights in bfloat16."""
    config = Qwen3MoeConfig(
        vocab_size=4096,
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
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0) if p.ndim == 1 else p.normal_(0.0, 0.02, generator=generator)
    model.save_pretrained(folder)


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of a wide block, as measured and as foreseen."""
    from memory import GB, in_a_process

    from sparlow.planning.plan import plan

    with tempfile.TemporaryDirectory() as scratch:
        wide(args.blocks, Path(scratch))
        size = {"samples": args.samples, "seqlen": args.seqlen}
        recipe = sparlow.Recipe(rank=64, options={"max_steps": 2}, **size)
        foreseen = plan(scratch, recipe, evaluate=(), timed=False)
        given = SimpleNamespace(**size, algorithm="3basil", brief=True, option=["max_steps=2"])
        found = in_a_process(Path(scratch), given)  # type: ignore[arg-type]  # which has what is asked for
        timed = plan(scratch, sparlow.Recipe(samples=128, seqlen=2048), evaluate=())
    beyond = foreseen.peak_memory["rss"] - foreseen.baseline
    found |= {"foreseen_beyond": beyond, "seconds_foreseen": timed.seconds}
    print(f"peak {found['peak'] / GB:.2f} GB, {(found['peak'] - found['libraries']) / GB:.2f} beyond the libraries,")
    print(f"of which {beyond / GB:.2f} were foreseen; a run of 128 × 2048 tokens would take {timed.seconds}")
    return found


def text_of(folder: Path) -> Tensor:
    """Bytes of local Python sources, in an order that mixes them."""
    files = sorted(folder.rglob("*.py"), key=lambda file: (zlib.crc32(str(file).encode()), file))
    data = b"".join(file.read_bytes() for file in files[:1500])
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long()


def trained(text: Tensor, steps: int, seed: int) -> Qwen3MoeForCausalLM:
    """Return a small mixture, trained until its experts differ."""
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=BYTES,
        hidden_size=192,
        num_hidden_layers=4,
        head_dim=32,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=SEQLEN,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=192,
        norm_topk_prob=True,
        output_router_logits=True,
        router_aux_loss_coef=0.01,
        tie_word_embeddings=True,
    )
    model = Qwen3MoeForCausalLM(config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        starts = torch.randint(len(text) - SEQLEN, (8,))
        ids = torch.stack([text[start : start + SEQLEN] for start in starts])
        loss = model(ids, labels=ids, use_cache=False).loss
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    model.config.output_router_logits = False
    return model.eval()


def windows_of(text: Tensor, count: int, seed: int) -> Tensor:
    """Return windows (count, SEQLEN) of a text."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - SEQLEN, (count,), generator=generator)
    return torch.stack([text[start : start + SEQLEN] for start in starts])


@torch.no_grad()
def judged(model: PreTrainedModel, dense: PreTrainedModel, windows: Tensor) -> dict[str, float]:
    """Divergence from the dense model in nats a byte, and perplexity a byte."""
    divergence, loss, count = 0.0, 0.0, 0
    for ids in windows.split(8):
        p, q = (one(ids, use_cache=False).logits[:, :-1].log_softmax(-1) for one in (dense, model))
        divergence += functional.kl_div(q, p, reduction="sum", log_target=True).item()
        loss += functional.nll_loss(q.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
        count += ids[:, 1:].numel()
    return {"divergence": divergence / count, "perplexity": math.exp(loss / count)}


@contextmanager
def borrowing(share: float) -> Iterator[None]:
    """Within this context, experts borrow so many tokens for each feature; inf: they have none of their own."""
    before = experts.BORROWED
    experts.BORROWED = 1e6 if math.isinf(share) else share
    try:
        yield
    finally:
        experts.BORROWED = before


def compressed(dense: PreTrainedModel, windows: Tensor, **recipe: Any) -> tuple[PreTrainedModel, float]:  # noqa: ANN401 - of a recipe
    """Return a compressed copy, and its bits a weight."""
    model = copy.deepcopy(dense)
    asked = sparlow.Recipe(seqlen=SEQLEN, samples=len(windows), **recipe)
    report = sparlow.compress(model, asked, calibration=windows, evaluate=(), inplace=True)
    return model, report.bits_per_weight


@torch.no_grad()
def reduced(dense: PreTrainedModel, windows: Tensor, left: int) -> PreTrainedModel:
    """Return a copy in which every router chooses among ``left`` experts alone."""
    model = copy.deepcopy(dense)
    for block in model.model.layers:
        block.mlp.kept = torch.ones(block.mlp.experts.num_experts, dtype=torch.bool)
    for block in model.model.layers:
        usefulness = _usefulness(model, block.mlp, windows)
        block.mlp.kept[usefulness.argsort()[: len(usefulness) - left]] = False
        block.mlp.gate.forward = _router(block.mlp.gate, block.mlp.kept)
    return model


def _usefulness(model: PreTrainedModel, moe: Any, windows: Tensor) -> Tensor:  # noqa: ANN401 - a module of transformers
    """Mean router weight times |output| over the tokens routed to each expert."""
    total = torch.zeros(moe.experts.num_experts, 2)

    def seen(module: Any, args: tuple[Tensor, Tensor, Tensor]) -> None:  # noqa: ANN401 - the same
        x, chosen, weights = args
        for number in range(module.num_experts):
            token, place = (chosen == number).nonzero(as_tuple=True)
            if len(token):
                gate, up = functional.linear(x[token], module.gate_up_proj[number]).chunk(2, dim=-1)
                y = functional.linear(module.act_fn(gate) * up, module.down_proj[number])
                total[number] += torch.tensor([(weights[token, place] * y.norm(dim=-1)).sum().item(), len(token)])

    hook = moe.experts.register_forward_pre_hook(seen)
    for ids in windows.split(8):
        model(ids, use_cache=False)
    hook.remove()
    return total[:, 0] / total[:, 1].clamp(min=1)


def _router(gate: Any, kept: Tensor) -> Any:  # noqa: ANN401 - a module of transformers, and its forward
    def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = functional.linear(x.reshape(-1, gate.hidden_dim), gate.weight).masked_fill(~kept, -torch.inf)
        value, index = logits.softmax(-1, dtype=torch.float).topk(min(gate.top_k, int(kept.sum())), dim=-1)
        return logits, (value / value.sum(-1, keepdim=True)).to(logits.dtype), index

    return forward


def quality(args: argparse.Namespace) -> dict[str, Any]:
    """Train, compress and judge, for every seed."""
    text = text_of(args.text)
    cut = len(text) * 9 // 10
    learnt, new = text[:cut], text[cut:]
    rows: list[dict[str, Any]] = []
    for seed in map(int, args.seeds.split(",")):
        dense = trained(learnt, args.steps, seed)
        held_out = windows_of(new, HELD_OUT, 1)
        rows.append({"seed": seed, "what": "dense", "bits": 16.0, **judged(dense, dense, held_out)})
        counts = [int(count) for count in args.windows.split(",")]
        calibration = {count: windows_of(learnt, count, seed + 2) for count in counts}
        for name, (_, recipe) in METHODS.items():
            model, bits = compressed(dense, calibration[counts[-1]], **recipe)
            rows.append({"seed": seed, "what": name, "bits": bits, **judged(model, dense, held_out)})
        for count, share in ((count, share) for count in counts for share in BORROWED):
            with borrowing(share):
                model, bits = compressed(dense, calibration[count], pattern="13:32", rank=8)
            what = f"borrowing {share:g} with {count} windows"
            rows.append({"seed": seed, "what": what, "bits": bits, **judged(model, dense, held_out)})
        for left in (6, 4, 2):
            model = reduced(dense, calibration[counts[-1]], left)
            found = judged(model, dense, held_out)
            rows.append({"seed": seed, "what": f"{left} of 8 experts left", "bits": 2.0 * left, **found})
        for row in rows:
            if row["seed"] == seed:
                print(json.dumps(row), flush=True)
    return {"rows": rows, "summary": summary(rows)}


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and spread over seeds."""
    found = {}
    for what in dict.fromkeys(row["what"] for row in rows):
        values = [row["divergence"] for row in rows if row["what"] == what]
        mean = sum(values) / len(values)
        spread = math.sqrt(sum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1))
        bits = next(row["bits"] for row in rows if row["what"] == what)
        found[what] = {"bits": bits, "divergence": mean, "spread": spread}
        print(f"{what:36} {bits:6.2f} bits   {mean:.5f} ± {spread:.5f} nats a byte")
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("memory", "quality"))
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--text", type=Path, default=Path(sysconfig.get_path("stdlib")), help="folder of .py files")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--windows", default="4,32", help="calibration windows")
    parser.add_argument("--json", type=Path, dest="json_file")
    args = parser.parse_args()
    found = memory(args) if args.what == "memory" else quality(args)
    if args.json_file:
        arguments = {name: str(value) for name, value in vars(args).items() if name != "json_file"}
        write_json(args.json_file, {"machine": machine(), "arguments": arguments, "cases": found})


if __name__ == "__main__":
    main()
