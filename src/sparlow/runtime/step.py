"""A token of each text through a whole decoder in one call of the kernel, see ``kernel/step.c``.

For weights as they are stored and for dense ones alike: a dense row of bfloat16 or float32 is a form that it reads.
"""

import ctypes
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparlow.errors import InputError
from sparlow.model.artefact.layers import SparseLowRankLinear
from sparlow.runtime.anatomy import Anatomy, Norm, UnlikeError, anatomy, close
from sparlow.runtime.build import NoKernelError, library
from sparlow.runtime.cache import StepCache
from sparlow.runtime.packed import PackedLinear, unrounded_inputs
from sparlow.runtime.product import TOKENS, Operand, operand, path_number

_BEGUN = 3  # tokens that the model itself reads before the step is tried on the others
_LEAST = 512  # positions of the first table of cosines


class _Weight(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("S", "V", "U", "fold", "bias")),
        ("rounded", ctypes.c_int64),
    )


class _Norm(ctypes.Structure):
    _fields_ = (("weight", ctypes.c_void_p), ("eps", ctypes.c_double))


class _Block(ctypes.Structure):
    _fields_ = (
        *((name, _Weight) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, _Norm) for name in ("before", "between", "of_q", "of_k")),
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
    )


class _Decoder(ctypes.Structure):
    _fields_ = (
        ("blocks", ctypes.c_void_p),
        *(
            (name, ctypes.c_int64)
            for name in ("count", "hidden", "inner", "heads", "groups", "head", "rotated", "room")
        ),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("cosine", "sine")),
        ("last", _Norm),
        ("output", _Weight),
        ("work", ctypes.c_void_p),
    )


class Step:
    """Computes the next token's logits of a model.

    Args:
        model: In memory, on the CPU. If its weights change, ``is_current`` says so, and another step is to be made.

    Raises:
        UnlikeError: The kernel has no step for it, and why.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        try:
            self._lib = library()
        except NoKernelError as problem:
            raise UnlikeError(f"there is no kernel: {problem}") from None
        self._marks = tuple(_marks(model))
        with unrounded_inputs(model) as self._rounded:  # rounding grows from block to block, and would hide differences
            self._build(model)
        for place, name in self._rounding:
            getattr(place, name).rounded = 1

    def _build(self, model: PreTrainedModel) -> None:
        found = anatomy(model)
        self._embedding, self.limit, self._rotary = found.embedding, found.limit, found.rotary
        self._kept: list[object] = []  # what the addresses point at
        self._rounding: list[tuple[ctypes.Structure, str]] = []  # places of layers whose inputs are rounded
        self._blocks = (_Block * len(found.blocks))()
        self._decoder = self._described(found)
        self._positions(_LEAST)
        self._texts = 0
        self._check(model, found)

    def is_current(self, model: PreTrainedModel) -> bool:
        """Whether the model's weights are those that the step was made for."""
        return self._marks == tuple(_marks(model))

    def cache(self) -> StepCache:
        """Return an empty cache for the step and for the model itself."""
        return StepCache(len(self._blocks))

    def takes(self, texts: int, position: int) -> bool:
        """Whether there is a step for so many texts at a position."""
        return 0 < texts <= TOKENS and position > 0 and (self.limit is None or position < self.limit)

    @torch.no_grad()
    def __call__(self, ids: Tensor, cache: StepCache) -> Tensor:
        """Return the logits (texts, vocabulary) float32 behind token ids (texts, 1), and add them to the cache."""
        at = cache.length
        x = self._embedding(ids).float().reshape(len(ids), -1).contiguous()
        self._place(cache, len(ids), at)
        logits = torch.empty(len(ids), self._outputs)
        failed = self._lib.functions.sparlow_step(
            path_number(self._lib), torch.get_num_threads(), ctypes.addressof(self._decoder), len(ids), at,
            x.data_ptr(), logits.data_ptr(),
        )  # fmt: skip
        if failed:
            raise MemoryError("There is no memory for a step.")
        cache.added()
        return logits

    def _place(self, cache: StepCache, texts: int, at: int) -> None:
        """Point at the cache's rooms, the work space and the cosines, which grow."""
        if at >= len(self._cosines):
            self._positions(2 * at)
        decoder = self._decoder
        room, begin = cache.reserve()
        for block, keys, values in zip(self._blocks, begin[::2], begin[1::2], strict=True):
            block.keys, block.values = keys, values
        if (decoder.room, self._texts) != (room, texts):
            decoder.room, self._texts = room, texts
            self._work = torch.empty(self._lib.functions.sparlow_step_work(ctypes.addressof(decoder), texts))
            decoder.work = self._work.data_ptr()

    def _positions(self, count: int) -> None:
        self._cosines, self._sines = self._rotary.table(torch.arange(count))
        self._decoder.cosine, self._decoder.sine = self._cosines.data_ptr(), self._sines.data_ptr()

    def _described(self, found: Anatomy) -> _Decoder:
        for place, block in zip(self._blocks, found.blocks, strict=True):
            for name, layer in block.linears.items():
                self._put(place, name, layer)
            for name in ("before", "between", "of_q", "of_k"):
                setattr(place, name, self._norm(getattr(block, name)))
        cosine, _ = found.rotary.table(torch.arange(1))
        first = found.blocks[0].linears
        self._outputs = found.logits.shape[-1]
        decoder = _Decoder(
            blocks=ctypes.addressof(self._blocks), count=len(self._blocks), hidden=_width(first["q"]),
            inner=_width(first["down"]), heads=found.heads, groups=found.groups, head=found.head_dim,
            rotated=cosine.shape[-1], scale=found.scale, last=self._norm(found.last),
        )  # fmt: skip
        self._put(decoder, "output", found.head)
        return decoder

    def _norm(self, norm: Norm | None) -> _Norm:
        if norm is None:
            return _Norm(None, 0.0)
        self._kept.append(norm.weight)
        return _Norm(norm.weight.data_ptr(), norm.eps)

    def _put(self, place: ctypes.Structure, name: str, layer: nn.Module) -> None:
        if id(layer) in self._rounded:
            self._rounding.append((place, name))
        found = operand_of(layer)
        self._kept.append(found)
        fold, bias = (None if t is None else t.data_ptr() for t in (found.fold, found.bias))
        V, U = (None if m is None else m.at for m in (found.V, found.U))
        setattr(place, name, _Weight(found.S.at, V, U, fold, bias, 0))

    def _check(self, model: PreTrainedModel, found: Anatomy) -> None:
        """Compare the step with the model itself, the same tokens being read by both."""
        cache = self.cache()
        with torch.no_grad():
            model(found.ids[:, :_BEGUN], past_key_values=cache, use_cache=True)
        logits = torch.cat([self(found.ids[:, i : i + 1], cache) for i in range(_BEGUN, found.ids.shape[1])])
        if not close(logits, found.logits[_BEGUN:], model.dtype):
            raise UnlikeError("it computes something else than what its structure shows")


def operand_of(layer: nn.Module) -> Operand:
    """Return a linear layer, packed, compressed or dense, as the kernel reads it.

    Raises:
        UnlikeError: The kernel does not read its type.
    """
    if isinstance(layer, PackedLinear):
        return layer.described()
    if isinstance(layer, SparseLowRankLinear):
        weight, factors = layer.S, {"U": layer.U.detach(), "V": layer.V.detach()}
    else:
        weight = layer.weight  # type: ignore[assignment]  # of a linear layer
        factors = {"U": weight.detach()[:, :0], "V": weight.detach()[:0]}
    flat = weight.detach().contiguous().view(-1)
    bias = layer.bias
    try:
        shape = (weight.shape[0], weight.shape[1])
        return operand({"weight": flat, **factors}, shape, None, bias)  # type: ignore[arg-type]  # a tensor or None
    except (InputError, KeyError):
        raise UnlikeError(f"the kernel does not read weights in {weight.dtype}") from None


def _width(layer: nn.Module) -> int:
    return int(layer.in_features)  # type: ignore[arg-type]  # of a linear layer


def _marks(model: PreTrainedModel) -> Iterator[tuple[int, int]]:
    """Yield what changes when a model's weights do."""
    for parameter in model.parameters():
        yield parameter.data_ptr(), parameter._version  # noqa: SLF001 - no public way
    for module in model.modules():
        if isinstance(module, PackedLinear):
            yield id(module), id(module.packed)
