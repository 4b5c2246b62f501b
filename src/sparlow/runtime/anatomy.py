"""What a decoder consists of, seen in one pass of its own: whether the kernel's step computes the same, and from what.

No architecture is named. Every module of a block that computes is watched: what reads whose output tells which is
which, and every parameter must have found its place. Whether the step gives the same logits is tried with numbers.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from sparlow.errors import InputError
from sparlow.model.artefact.layers import SparseLowRankLinear
from sparlow.model.forward.decoder import Decoder, is_norm, output_head
from sparlow.runtime.packed import PackedLinear

LINEAR = (nn.Linear, PackedLinear, SparseLowRankLinear)
PROBE = 8  # tokens of a pass: as many as the kernel takes at once
_LARGE = 1e4  # an input beside whose square the epsilon of a norm is nothing
_CLOSE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.05}  # of what is compared


class UnlikeError(InputError):
    """The kernel has no step for a model, and why; a clause that goes on "…, because"."""


@dataclass(frozen=True)
class Norm:
    """x / √(mean x² + eps) · weight, weight (features,) float32."""

    weight: Tensor
    eps: float


@dataclass(frozen=True)
class Block:
    """Linear layers and norms of a block, by what they do."""

    linears: Mapping[str, nn.Module]
    before: Norm
    between: Norm
    of_q: Norm | None
    of_k: Norm | None


@dataclass(frozen=True)
class Rotary:
    """The module that gives the cosines and sines of positions, and how it was called."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def table(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines (positions, features) in float32."""

        def given(value: object) -> object:
            if not isinstance(value, Tensor):
                return value
            return value.float() if value.is_floating_point() else positions[None]

        cosine, sine = self.module(*map(given, self.args), **{key: given(v) for key, v in self.kwargs.items()})
        return cosine[0].float().contiguous(), sine[0].float().contiguous()


@dataclass(frozen=True)
class Anatomy:
    """A decoder.

    Attributes:
        embedding: Gives the first block's input.
        blocks: In order.
        last: The norm behind them.
        head: Gives the logits.
        rotary: Turns queries and keys.
        heads: Of queries.
        groups: Heads of keys.
        head_dim: Features of each.
        scale: Of their products.
        limit: Position from which on it is another model; None: never.
        ids: That it was watched with, (1, tokens).
        logits: Its own, (tokens, vocabulary).
    """

    embedding: nn.Module
    blocks: Sequence[Block]
    last: Norm
    head: nn.Module
    rotary: Rotary
    heads: int
    groups: int
    head_dim: int
    scale: float
    limit: int | None
    ids: Tensor
    logits: Tensor


@dataclass(frozen=True)
class _Call:
    module: nn.Module
    given: Tensor
    gave: Tensor


@dataclass
class _Seen:
    inside: dict[int, list[_Call]]  # by block
    outside: list[_Call]
    entered: dict[int, tuple[Tensor, Mapping[str, Any]]]  # by block: its input, and what else it was given
    pairs: list[tuple[Tensor, Rotary]]  # cosines, and the module that gave them


@torch.no_grad()
def anatomy(model: PreTrainedModel) -> Anatomy:
    """Return what a model consists of.

    Raises:
        UnlikeError: It is not of the kind that the kernel steps through.
    """
    if model.device.type != "cpu":
        raise UnlikeError(f"the model is on {model.device}")
    decoder = Decoder.of(model)
    untyped: Any = model  # transformers does not annotate it
    head, embedding = output_head(model), untyped.get_input_embeddings()
    if head is None or embedding is None:
        raise UnlikeError("the model has no embedding or no output head")
    size = int(getattr(embedding, "num_embeddings", 0))
    ids = torch.randint(max(size, 1), (1, PROBE), generator=torch.Generator().manual_seed(0))
    cache = DynamicCache()
    with _watched(model, decoder) as seen:
        logits = untyped(ids, past_key_values=cache, use_cache=True).logits[0]
    blocks = [_block(seen.inside[i], block) for i, block in enumerate(decoder.blocks)]
    rotary, cosine = _rotary(seen)
    last = _ends(seen, embedding, head, logits)
    first: Any = cache.layers[0]
    keys: Tensor = first.keys
    q = blocks[0].linears["q"]
    head_dim, groups = int(keys.shape[3]), int(keys.shape[1])
    heads = int(q.out_features) // head_dim  # type: ignore[arg-type]  # of a linear layer
    _check_widths(blocks, heads, groups, head_dim, int(cosine.shape[-1]))
    return Anatomy(
        embedding, blocks, last, head, rotary, heads, groups, head_dim, _scale(decoder.blocks[0], head_dim),
        _limit(model), ids, logits.float(),
    )  # fmt: skip


@contextmanager
def _watched(model: PreTrainedModel, decoder: Decoder) -> Iterator[_Seen]:
    seen = _Seen({i: [] for i in range(len(decoder))}, [], {}, [])
    place = {module: i for i, block in enumerate(decoder.blocks) for module in block.modules()}
    number = {block: i for i, block in enumerate(decoder.blocks)}

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.entered[number[module]] = (next(_tensors(args, kwargs)), kwargs)

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        if isinstance(output, Tensor):
            given = next(_tensors(args, kwargs), None)
            calls = seen.inside[place[module]] if module in place else seen.outside
            if given is not None:
                calls.append(_Call(module, given, output))
        elif isinstance(output, tuple) and len(output) == 2 and all(isinstance(t, Tensor) for t in output):  # noqa: PLR2004 - cosines and sines
            seen.pairs.append((output[0], Rotary(module, args, kwargs)))

    with ExitStack() as hooks:
        for module in model.modules():
            if module in number:
                hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            elif not any(True for _ in module.children()):
                hooks.callback(module.register_forward_hook(leave, with_kwargs=True).remove)
        yield seen


def _tensors(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    return (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors, both still alive, are the same numbers; their shapes may differ by views."""
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _block(calls: Sequence[_Call], block: nn.Module) -> Block:
    linear = [call for call in calls if type(call.module) in LINEAR]
    norms = [call for call in calls if call not in linear and is_norm(call.module)]
    if len(linear) != 7:  # noqa: PLR2004 - q k v o, gate up down
        raise UnlikeError(f"a block has {len(linear)} linear layers, not 7")
    q, k, v, o, gate, up, down = linear
    if not (_same(q.given, k.given) and _same(q.given, v.given) and _same(gate.given, up.given)):
        raise UnlikeError("queries, keys and values, or the two layers of the gate, do not read the same input")
    before, between = (_behind(norms, call.given) for call in (q, gate))
    if before is None or between is None:
        raise UnlikeError("no norm stands before the attention, or before the layers behind it")
    of_q, of_k = (next((n for n in norms if _same(n.given, call.gave)), None) for call in (q, k))
    gate, up = _gate_first(calls, gate, up)
    used = [before, between, *filter(None, (of_q, of_k))]
    mine = {p for call in (*linear, *used) for p in call.module.parameters()}
    if {*block.parameters()} - mine or len(used) != len(norms):
        raise UnlikeError("a block has parameters beside its linear layers and norms")
    names = ("q", "k", "v", "o", "gate", "up", "down")
    layers = dict(zip(names, (call.module for call in (q, k, v, o, gate, up, down)), strict=True))
    return Block(
        layers, *(_norm(n.module, n.given) for n in (before, between)),
        *(_norm(n.module, n.given) if n else None for n in (of_q, of_k)),
    )  # fmt: skip


def _behind(norms: Sequence[_Call], given: Tensor) -> _Call | None:
    return next((norm for norm in norms if _same(norm.gave, given)), None)


def _gate_first(calls: Sequence[_Call], one: _Call, other: _Call) -> tuple[_Call, _Call]:
    """Return that of two layers first whose output goes through the activation, which must be SiLU."""
    for call in calls:
        found = next((layer for layer in (one, other) if call.given is layer.gave), None)
        if found is not None and not any(True for _ in call.module.parameters()):
            x = torch.linspace(-8, 8, 33)
            if not torch.allclose(call.module(x), nn.functional.silu(x), atol=1e-5):
                raise UnlikeError("the activation is not SiLU")
            return found, other if found is one else one
    return one, other


def _norm(module: nn.Module, given: Tensor) -> Norm:
    eps = [value for value in vars(module).values() if isinstance(value, float)]
    if len(eps) != 1:
        raise UnlikeError("a norm has no epsilon")
    ones = torch.full((1, given.shape[-1]), _LARGE, dtype=given.dtype)
    found = Norm(module(ones)[0].float().clone(), eps[0])
    x = torch.randn(2, given.shape[-1], generator=torch.Generator().manual_seed(0)).to(given.dtype)
    right = x.float() * (x.float().square().mean(-1, keepdim=True) + found.eps).rsqrt() * found.weight
    if not close(module(x), right, given.dtype):
        raise UnlikeError("a norm is not a root-mean-square one")
    return found


def close(found: Tensor, right: Tensor, dtype: torch.dtype) -> bool:
    """Whether two results agree as well as a model's type lets them: the mean square of what differs."""
    off = (found.float() - right.float()).square().mean().sqrt() / right.float().square().mean().sqrt()
    return bool(off <= _CLOSE.get(dtype, 1e-4))


def _rotary(seen: _Seen) -> tuple[Rotary, Tensor]:
    """Return what gives the positions to every block, and the cosines."""
    found = None
    for _, kwargs in seen.entered.values():
        pairs = [v for v in kwargs.values() if isinstance(v, tuple) and len(v) == 2 and isinstance(v[0], Tensor)]  # noqa: PLR2004 - cosines and sines
        here = next(((r, c) for pair in pairs for c, r in seen.pairs if c is pair[0]), None)
        if here is None or (found is not None and here[0] is not found[0]):
            raise UnlikeError("its blocks are not all given the same cosines and sines of positions")
        found = here
    if found is None:
        raise UnlikeError("it has no blocks")
    rotary = found[0]
    near = torch.arange(PROBE)
    far = torch.cat([near, torch.tensor([_FAR])])
    one, other = rotary.table(near), rotary.table(far)
    rotary.table(near)  # what a long text may have changed in the module is undone
    if not all(torch.equal(a, b[:PROBE]) for a, b in zip(one, other, strict=True)):
        raise UnlikeError("its cosines and sines depend on the length of the text")
    return found


_FAR = 1 << 20  # a position beyond any context


def _ends(seen: _Seen, embedding: nn.Module, head: nn.Module, logits: Tensor) -> Norm:
    """Return the norm before the head, if nothing else is done outside of the blocks."""
    calls = {id(call.module): call for call in seen.outside}
    first, end = calls.get(id(embedding)), calls.get(id(head))
    if first is None or not _same(first.gave, seen.entered[0][0]):
        raise UnlikeError("something stands between the embedding and the first block")
    if end is None or type(head) not in LINEAR or not _same(end.gave, logits):
        raise UnlikeError("something stands behind the output head")
    last = _behind([call for call in seen.outside if is_norm(call.module)], end.given)
    if last is None:
        raise UnlikeError("no norm stands before the output head")
    return _norm(last.module, last.given)


def _check_widths(blocks: Sequence[Block], heads: int, groups: int, head_dim: int, rotated: int) -> None:
    width = {"q": heads * head_dim, "k": groups * head_dim, "v": groups * head_dim}
    for block in blocks:
        outputs = {name: block.linears[name].out_features for name in width}
        narrow = [norm for norm in (block.of_q, block.of_k) if norm]
        if outputs != width or heads % groups or any(len(norm.weight) != head_dim for norm in narrow):
            raise UnlikeError("its blocks differ in their heads, or the heads of one have different widths")
    if rotated > head_dim or rotated % 2:
        raise UnlikeError("more features are turned by positions than a head has")


def _scale(block: nn.Module, head_dim: int) -> float:
    found = {scale for m in block.modules() if isinstance(scale := vars(m).get("scaling"), float)}
    return found.pop() if len(found) == 1 else head_dim**-0.5


def _limit(model: PreTrainedModel) -> int | None:
    """Return from which position on a token does not see all before it, or the model's context ends."""
    config: Any = model.config.get_text_config()
    names = ("sliding_window", "attention_chunk_size", "max_position_embeddings")
    found = [value for name in names if isinstance(value := getattr(config, name, None), int) and value > 0]
    return min(found, default=None)
