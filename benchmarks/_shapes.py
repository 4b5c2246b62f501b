"""Checkpoints in the shape of published models, with random weights: what size costs without downloading anything."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from sparlow.files import INDEX


@dataclass(frozen=True)
class Shape:
    """Widths of a decoder with grouped attention and a gated MLP, or many of which a token passes some."""

    hidden: int
    inner: int
    heads: int
    groups: int
    vocabulary: int
    blocks: int
    experts: int = 1
    passed: int = 1  # experts that a token passes
    head: int = 0  # features of a head, if not all heads together have those of the hidden state

    @property
    def query(self) -> int:
        """Features of queries."""
        return self.head * self.heads or self.hidden

    @property
    def key(self) -> int:
        """Features of keys, and of values."""
        return self.query // self.heads * self.groups

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the linear layers of a block."""
        d, query, key, inner = self.hidden, self.query, self.key, self.inner
        attention = {"q_proj": (query, d), "k_proj": (key, d), "v_proj": (key, d), "o_proj": (d, query)}
        named = {f"self_attn.{name}": shape for name, shape in attention.items()}
        if self.experts > 1:  # in one parameter each, as transformers has them
            mlp, places = {"gate_up_proj": (2 * inner, d)}, [f"mlp.experts.{i}." for i in range(self.experts)]
        else:
            mlp, places = {"gate_proj": (inner, d), "up_proj": (inner, d)}, ["mlp."]
        mlp["down_proj"] = (d, inner)
        return named | {f"{place}{name}": shape for place in places for name, shape in mlp.items()}

    @property
    def inputs(self) -> list[tuple[int, float]]:
        """Features of each distinct input of the linear layers, and the share of all tokens that it sees."""
        share = self.passed / self.experts
        return [(self.hidden, 1.0), (self.query, 1.0), *[(self.hidden, share), (self.inner, share)] * self.experts]


SHAPES = {
    "llama-3.2-1b": Shape(2048, 8192, 32, 8, 128256, 16),
    "llama-3-8b": Shape(4096, 14336, 32, 8, 128256, 32),
    "llama-3-70b": Shape(8192, 28672, 64, 8, 128256, 80),
    "llama-3-405b": Shape(16384, 53248, 128, 8, 128256, 126),
    "qwen3-235b-a22b": Shape(4096, 1536, 64, 4, 151936, 94, experts=128, passed=8, head=128),
    "small": Shape(1024, 3584, 16, 4, 16384, 4),  # an eighth of the work in every product, for a quick look
    "tiny": Shape(256, 512, 4, 2, 512, 2),  # seconds on one core: to see that a script works
}


def write(shape: Shape, blocks: int, folder: Path, *, seed: int = 0) -> None:
    """Write a checkpoint with so many blocks in bfloat16, one file a block, never holding more than one."""
    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.groups,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    where: dict[str, str] = {}
    for i, state in enumerate(_states(shape, blocks, generator)):
        file = f"model-{i + 1:05d}-of-{blocks + 1:05d}.safetensors"
        save_file(state, folder / file, {"format": "pt"})
        where |= dict.fromkeys(state, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def _states(shape: Shape, blocks: int, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
    def random(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    ones = torch.ones(shape.hidden, dtype=torch.bfloat16)
    for i in range(blocks):
        state = {f"model.layers.{i}.{name}.weight": random(*size) for name, size in shape.linears.items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        yield state | {f"model.layers.{i}.{name}.weight": ones.clone() for name in norms}
    table = (shape.vocabulary, shape.hidden)
    yield {"model.embed_tokens.weight": random(*table), "lm_head.weight": random(*table), "model.norm.weight": ones}


def random_windows(vocabulary: int, samples: int, seqlen: int) -> Tensor:
    """Token ids (samples, seqlen) int64."""
    return torch.randint(0, vocabulary, (samples, seqlen), generator=torch.Generator().manual_seed(1))
