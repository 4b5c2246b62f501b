"""A small mixture of experts, really trained on local text, and text in three parts that never meet.

Training goes on where it was killed: each step draws its windows from a generator of its own, and a checkpoint holds
the rest.
"""

import copy
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

SEQLEN = 256
BYTES = 256  # tokens there are
BATCH = 8  # windows of a step
MOST_FILES = 400  # of a folder
RATE, WARM_UP = 1.5e-3, 0.1
BALANCE = 0.01  # weight of the loss that spreads tokens over experts
SAVED_EVERY = 50  # steps


@dataclass(frozen=True)
class Size:
    """What a mixture is made of.

    Attributes:
        width: Of the hidden state.
        blocks: How many.
        inner: Width of an expert.
        experts: In each block.
        chosen: For each token.
    """

    width: int = 320
    blocks: int = 6
    inner: int = 448
    experts: int = 8
    chosen: int = 2

    def config(self) -> Qwen3MoeConfig:
        """Return that of a Qwen3-MoE of bytes."""
        return Qwen3MoeConfig(
            vocab_size=BYTES,
            hidden_size=self.width,
            num_hidden_layers=self.blocks,
            head_dim=32,
            num_attention_heads=self.width // 32,
            num_key_value_heads=2,
            max_position_embeddings=SEQLEN,
            num_experts=self.experts,
            num_experts_per_tok=self.chosen,
            moe_intermediate_size=self.inner,
            norm_topk_prob=True,
            router_aux_loss_coef=0.0,  # _balance below
            tie_word_embeddings=True,
        )


class Text:
    """Bytes of several sources: 60 % to learn and calibrate on, 20 % to choose by, 20 % to report on.

    Args:
        sources: Files; of ``.jsonl`` the ``text`` of its records, of a folder its ``.py`` files.
    """

    def __init__(self, sources: Sequence[Path]) -> None:
        parts = [_parts(_pieces(source)) for source in sources]
        self.learnt, self.choosing, self.reporting = ([*part] for part in zip(*parts, strict=True))

    @staticmethod
    def windows(parts: Sequence[Tensor], count: int, seed: int) -> Tensor:
        """Return windows (count, SEQLEN), each of a source drawn at random."""
        generator = torch.Generator().manual_seed(seed)
        which = torch.randint(len(parts), (count,), generator=generator).tolist()
        starts = torch.rand(count, generator=generator, dtype=torch.float64).tolist()
        cuts = ((parts[i], int(start * (len(parts[i]) - SEQLEN))) for i, start in zip(which, starts, strict=True))
        return torch.stack([part[start : start + SEQLEN] for part, start in cuts]).long()


def _pieces(source: Path) -> list[bytes]:
    if source.suffix == ".jsonl":
        return [json.loads(line)["text"].encode() + b"\n\n" for line in source.open("rb")]
    if source.is_dir():
        found = (file for file in source.rglob("*.py") if not {"site-packages", "test", "tests"} & {*file.parts})
        ordered = sorted(found, key=lambda file: (zlib.crc32(str(file.relative_to(source)).encode()), file))
        return [file.read_bytes() + b"\n\n" for file in ordered[:MOST_FILES]]
    data = source.read_bytes()
    return [data[i * len(data) // 10 : (i + 1) * len(data) // 10] for i in range(10)]


def _parts(pieces: list[bytes]) -> list[Tensor]:
    cuts = [0, len(pieces) * 6 // 10, len(pieces) * 8 // 10, len(pieces)]
    joined = [b"".join(pieces[start:end]) for start, end in pairwise(cuts)]
    return [torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in joined]


def trained(text: Text, size: Size, steps: tuple[int, int], file: Path) -> Qwen3MoeForCausalLM:
    """Return a mixture, trained from nothing; products are in bfloat16, weights in 32 bits.

    Args:
        text: Whose first part it learns.
        size: Of the model.
        steps: Of ``BATCH`` windows: how many are taken, and how many the schedule of the rate has.
        file: Where a run that was killed goes on, and which is read where it is whole.
    """
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(size.config())
    model.set_experts_implementation("eager")  # a fifth faster than the grouped one on a CPU
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps[1], pct_start=WARM_UP)
    parts: dict[str, Any] = {"model": model, "optimiser": optimiser, "schedule": schedule}
    done = _resumed(parts, file)
    for step in range(done, steps[0]):
        ids = text.windows(text.learnt, BATCH, step)
        with torch.autocast("cpu", torch.bfloat16):
            found = model(ids, labels=ids, use_cache=False, output_router_logits=True)
        optimiser.zero_grad()
        (found.loss + BALANCE * _balance(found.router_logits, size)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if (step + 1) % SAVED_EVERY == 0 or step + 1 == steps[0]:
            print(f"step {step + 1}: loss {found.loss.item():.3f}", flush=True)
            _save(parts, step + 1, file)
    return model.eval()


def _balance(router_logits: Sequence[Tensor], size: Size) -> Tensor:
    """Return the mean over blocks of the loss that spreads tokens over experts.

    transformers takes it of all blocks joined, where a block that does not use some experts makes up for another.
    """
    found = [load_balancing_loss_func((logits,), size.experts, size.chosen) for logits in router_logits]
    return torch.stack(found).mean()


def _resumed(parts: dict[str, Any], file: Path) -> int:
    """Put what a file holds into the parts, and return the steps it has seen."""
    if not file.exists():
        return 0
    state = torch.load(file)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return int(state["steps"])


def _save(parts: dict[str, Any], steps: int, file: Path) -> None:
    beside = file.with_suffix(".partial")
    torch.save({name: part.state_dict() for name, part in parts.items()} | {"steps": steps}, beside)
    beside.replace(file)


@torch.no_grad()
def usefulness(model: PreTrainedModel, windows: Tensor) -> list[Tensor]:
    """Return for each block the mean router weight · |output| of every expert over the tokens routed to it, dense.

    This is the criterion of REAP (Lasby et al., 2025, arXiv 2510.13999), from its description.
    """
    blocks = [block.mlp.experts for block in model.model.layers]
    totals = [torch.zeros(experts.num_experts, 2) for experts in blocks]
    hooks = [part.register_forward_pre_hook(partial(_weigh, total)) for part, total in zip(blocks, totals, strict=True)]
    for ids in windows.split(8):
        model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [total[:, 0] / total[:, 1].clamp(min=1) for total in totals]


def _weigh(total: Tensor, module: Any, args: tuple[Tensor, Tensor, Tensor]) -> None:  # noqa: ANN401 - of transformers
    """Add Σ router weight · |output| and the tokens of each expert to a total (experts, 2)."""
    x, chosen, weights = args
    for number in range(module.num_experts):
        token, place = (chosen == number).nonzero(as_tuple=True)
        if len(token):
            gate, up = functional.linear(x[token], module.gate_up_proj[number]).chunk(2, dim=-1)
            y = functional.linear(module.act_fn(gate) * up, module.down_proj[number])
            total[number] += torch.tensor([(weights[token, place] * y.norm(dim=-1)).sum().item(), len(token)])


def reduce_experts(model: PreTrainedModel, useful: Sequence[Tensor], left: int) -> None:
    """Let every router choose among ``left`` experts of its block alone, the most useful."""
    for block, values in zip(model.model.layers, useful, strict=True):
        kept = torch.zeros(len(values), dtype=torch.bool)
        kept[values.argsort(descending=True)[:left]] = True
        block.mlp.gate.forward = _router(block.mlp.gate, kept)


def _router(gate: Any, kept: Tensor) -> Any:  # noqa: ANN401 - a module of transformers, and its forward
    def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = functional.linear(x.reshape(-1, gate.hidden_dim), gate.weight).masked_fill(~kept, -torch.inf)
        value, index = logits.softmax(-1, dtype=torch.float).topk(min(gate.top_k, int(kept.sum())), dim=-1)
        return logits, (value / value.sum(-1, keepdim=True)).to(logits.dtype), index

    return forward


def experts_swapped(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy in which each token goes to the experts behind those that the router chose."""
    found = copy.deepcopy(model)
    for block in found.model.layers:
        block.mlp.gate.register_forward_hook(lambda gate, _, out: (*out[:2], (out[2] + 1) % gate.num_experts))
    return found


@torch.no_grad()
def shares_of_sources(model: PreTrainedModel, text: Text, count: int = 16) -> list[list[list[float]]]:
    """Return, for each block and each source of held-out text, the share of its tokens that every expert gets."""
    found: list[list[list[float]]] = [[] for _ in model.model.layers]
    for part in text.choosing:
        hooks = []
        for i, block in enumerate(model.model.layers):
            counts = torch.zeros(block.mlp.gate.num_experts)
            hooks.append(block.mlp.gate.register_forward_hook(partial(_count, counts)))
            found[i].append(counts)  # type: ignore[arg-type]  # a list below
        model(text.windows([part], count, 0), use_cache=False)
        for hook in hooks:
            hook.remove()
    return [[[round(share, 3) for share in (one / one.sum()).tolist()] for one in block] for block in found]


def _count(counts: Tensor, _gate: nn.Module, _args: tuple[Tensor, ...], out: tuple[Tensor, ...]) -> None:
    counts += out[2].flatten().bincount(minlength=len(counts))
