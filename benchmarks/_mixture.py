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

SEQLEN = 256
BYTES = 256  # tokens there are
BATCH = 16  # windows of a step
MOST_FILES = 400  # of a folder
RATE, WARM_UP = 2e-3, 0.1
SAVED_EVERY = 25  # steps


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

    width: int = 256
    blocks: int = 4
    inner: int = 256
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
            output_router_logits=True,
            router_aux_loss_coef=0.01,
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
    """Return a mixture, trained with the usual loss that spreads tokens over experts.

    Args:
        text: Whose first part it learns.
        size: Of the model.
        steps: Of ``BATCH`` windows: how many are taken, and how many the schedule of the rate has.
        file: Where a run that was killed goes on, and which is read where it is whole.
    """
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(size.config())
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps[1], pct_start=WARM_UP)
    parts: dict[str, Any] = {"model": model, "optimiser": optimiser, "schedule": schedule}
    done = _resumed(parts, file)
    for step in range(done, steps[0]):
        ids = text.windows(text.learnt, BATCH, step)
        loss = model(ids, labels=ids, use_cache=False).loss
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if (step + 1) % SAVED_EVERY == 0 or step + 1 == steps[0]:
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)
            _save(parts, step + 1, file)
    model.config.output_router_logits = False
    return model.eval()


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
def reduce_experts(model: PreTrainedModel, windows: Tensor, left: int) -> None:
    """Let every router choose among ``left`` experts alone, those of most mean router weight · |output|.

    The mean is over the tokens routed to an expert, in the dense model (REAP, Lasby et al., 2025, arXiv 2510.13999,
    from its description).
    """
    found = [_usefulness(model, block.mlp, windows) for block in model.model.layers]
    for block, usefulness in zip(model.model.layers, found, strict=True):
        kept = torch.zeros(len(usefulness), dtype=torch.bool)
        kept[usefulness.argsort(descending=True)[:left]] = True
        block.mlp.gate.forward = _router(block.mlp.gate, kept)


def _usefulness(model: PreTrainedModel, moe: Any, windows: Tensor) -> Tensor:  # noqa: ANN401 - a module of transformers
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
