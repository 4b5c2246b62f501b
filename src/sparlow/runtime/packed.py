"""Packed layers: they compute with the tensors of the file as they lie there, and never hold them expanded."""

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from sparlow.errors import InputError
from sparlow.linalg.grid import Grid
from sparlow.machine import has_bfloat16_arithmetic
from sparlow.model.artefact.layers import SparseLowRankLinear, StillPacked
from sparlow.model.artefact.stored_form import PARTS, unpack_weight
from sparlow.runtime.options import ACTIVATIONS
from sparlow.runtime.product import Operand, operand
from sparlow.schema import unknown

_BLOCK = 64  # columns, see sparlow.h
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8)  # that the kernel reads
_numbers = itertools.count()
_layers: WeakValueDictionary[int, Any] = WeakValueDictionary()  # by number, which torch.compile can hold


@dataclass(frozen=True)
class Packed:
    """A weight as it is stored.

    Attributes:
        parts: Its tensors by the last part of their names.
        shape: (out, in).
        grid: That of the values; None for floats.
        dtype: To which decoded numbers are rounded where they are expanded.
        bias: (out,), or None.
    """

    parts: Mapping[str, Tensor]
    shape: tuple[int, int]
    grid: Grid | None
    dtype: torch.dtype
    bias: Tensor | None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All of it by the last part of names, the bias included."""
        return {**self.parts, **({} if self.bias is None else {"bias": self.bias})}

    @cached_property
    def outward(self) -> dict[str, Tensor]:
        """What is stored for others, each the same memory as a storage of its own.

        To send a tensor to another process, torch moves its storage to shared memory and frees what was there; the
        kernel would go on reading that. So the layer's own tensors never leave it, and what leaves it lives as long.
        """
        return {part: _view(tensor.detach()) for part, tensor in self.tensors.items()}

    def __getstate__(self) -> dict[str, Any]:
        parts = dict(self.outward)
        return vars(replace(self, bias=parts.pop("bias", None), parts=parts))


def _view(t: Tensor) -> Tensor:
    return from_dlpack(t) if t.numel() else t.clone()


def layer_of(number: int) -> Any:  # noqa: ANN401 - a PackedModule of some class
    """Return a packed layer by its number."""
    return _layers[number]


def kernel_reads(dtypes: Mapping[str, torch.dtype | None]) -> bool:
    """Whether the kernel reads weights whose tensors have these types."""
    return all(dtype in _DTYPES for part, dtype in dtypes.items() if part in PARTS)


class PackedModule(StillPacked):
    """What a layer that stays packed does beside computing: it has no parameters, and holds the tensors of a file.

    ``half``, ``float`` and ``to`` leave what is stored alone, copies share it, and the state dict holds it under its
    names in the file.

    Args:
        packed: The weight, its tensors on the CPU.

    Raises:
        InputError: The tensors do not fit each other, or there is no kernel on this machine.
    """

    def __init__(self, packed: Packed) -> None:
        super().__init__()
        self.packed = packed
        self.unseen = False  # whether the state dict leaves out what is stored: while transformers opens a model
        self._operand: Operand | None = operand(packed.parts, packed.shape, packed.grid, packed.bias)
        self._register()

    def _register(self) -> None:
        self._number = next(_numbers)
        _layers[self._number] = self

    def described(self) -> Operand:
        """Return the weight as the kernel reads it."""
        if self._operand is None:
            packed = self.packed
            self._operand = operand(packed.parts, packed.shape, packed.grid, packed.bias)
        return self._operand

    def take(self, packed: Packed) -> None:
        """Hold the same weight at another place in memory."""
        self.packed, self._operand = packed, None

    @property
    def values(self) -> str:
        """The type of the stored values."""
        return self.packed.grid.name if self.packed.grid else str(self.packed.parts["weight"].dtype).split(".")[-1]

    @property
    def bytes(self) -> int:
        """What is stored takes."""
        return sum(tensor.nbytes for tensor in self.packed.tensors.values())

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_operand": None}  # addresses of this process

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # untyped in torch
        self._register()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        state = self.__dict__ | {"_operand": None}
        other.__setstate__({k: v.copy() if isinstance(v, dict) else v for k, v in state.items()})
        return other

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.unseen:
            destination |= {f"{prefix}{part}": tensor for part, tensor in self.packed.outward.items()}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:  # noqa: ANN401 - torch
        *_, missing, _unexpected, errors = args
        found = {part: state_dict.get(f"{prefix}{part}") for part in self.packed.tensors}
        missing += [f"{prefix}{part}" for part, tensor in found.items() if tensor is None]
        try:
            self._take({part: t.detach().clone().cpu().contiguous() for part, t in found.items() if t is not None})
        except InputError as problem:
            errors.append(f"{prefix.removesuffix('.')}: {problem}")

    def _take(self, found: dict[str, Tensor]) -> None:
        own = self.packed.tensors
        for part, tensor in found.items():
            if tensor.dtype != own[part].dtype or tensor.ndim != own[part].ndim or (
                part != "weight" and tensor.shape != own[part].shape
            ):  # fmt: skip
                raise InputError(f"Its {part} is stored in another way. Open the directory with sparlow.load.")
        if found.keys() == own.keys():
            packed, bias = self.packed, found.pop("bias", None)
            self._operand = operand(found, packed.shape, packed.grid, bias)
            self.packed = Packed(found, packed.shape, packed.grid, packed.dtype, bias)


class PackedLinear(PackedModule):
    """y = x Sᵀ + (x Vᵀ) Uᵀ + b on the CPU, S, U and V being decoded on the way, in float32 and unrounded.

    Only many tokens in bfloat16 are multiplied by S in bfloat16, where the processor has instructions for that. The
    result has the type of x. Gradients reach x, but nothing of the layer is trained; ``dequantize`` gives a layer
    for that.

    Args:
        packed: The weight, its tensors on the CPU.
        activations: ``float``; or ``int8``: up to 8 tokens are rounded to int8, a scale for each token and 32 columns,
            wherever the levels of S are integers and a group whole multiples of 64 columns.

    Raises:
        InputError: The tensors do not fit each other, or there is no kernel on this machine.
    """

    def __init__(self, packed: Packed, activations: str = "float") -> None:
        if activations not in ACTIVATIONS:
            raise InputError(unknown(f"There are no activations {activations!r}", activations, ACTIVATIONS))
        super().__init__(packed)
        self.activations = activations
        self.out_features, self.in_features = packed.shape
        self.rank = len(packed.parts["V"])

    @property
    def rounds(self) -> bool:
        """Whether its inputs are rounded."""
        struct = self.described().S.struct
        blocks = struct.group >= struct.cols or struct.group % _BLOCK == 0
        return self.activations == "int8" and self.described().S.coded and blocks

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, in) to (…, out), in the type of x."""
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad):
            y: Tensor = torch.ops.sparlow.packed_linear(x, self._number, self.out_features)
            return y
        return self.product(x)

    def product(self, x: Tensor) -> Tensor:
        """Return the result without gradients.

        Raises:
            InputError: x is not on the CPU, or has another width.
        """
        if x.device.type != "cpu":
            raise InputError(
                f"Packed layers compute on the CPU, not on {x.device.type}. Open the model with mode='dense'."
            )
        if x.shape[-1] != self.in_features:
            raise InputError(f"The input must have {self.in_features} columns, not {x.shape[-1]}.")
        flat = x.detach().reshape(-1, self.in_features).contiguous()
        if x.dtype != torch.bfloat16 or not has_bfloat16_arithmetic():
            flat = flat.float()
        y = self.described().product(flat, rounded=self.activations == "int8")
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def back(self, dy: Tensor) -> Tensor:
        """Return the gradient of x (…, in) for that of the result (…, out)."""
        flat = dy.detach().reshape(-1, self.out_features).float().contiguous()
        return self.described().back(flat).view(*dy.shape[:-1], self.in_features).to(dy.dtype)

    def dequantize(self) -> SparseLowRankLinear:
        """Return the same layer in floats, to be trained; what ``mode="dense"`` opens."""
        packed = self.packed
        weight, stored = unpack_weight(packed.parts, packed.shape, packed.grid, packed.dtype)
        layer = SparseLowRankLinear(*weight, packed.bias)
        layer.stored = stored
        return layer.train(self.training)

    @property
    def weight(self) -> Tensor:
        """S + U V (out, in), for code that looks at a linear layer's weight; expanded at each access."""
        return self.dequantize().weight.detach()

    @property
    def qweight(self) -> Tensor:
        """What is stored of S: libraries that look for a device (PEFT) ask for this name before ``weight``."""
        return self.packed.parts["weight"]

    @property
    def bias(self) -> Tensor | None:
        """The bias (out,), or None."""
        return self.packed.bias

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows of the layer."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
        return f"{sizes}, bias={self.bias is not None}, values={self.values}, activations={self.activations}"


@contextmanager
def unrounded_inputs(model: nn.Module) -> Iterator[set[int]]:
    """Within this context no packed layer of a model rounds its inputs; yield the ids of those that otherwise do."""
    found = [m for m in model.modules() if isinstance(m, PackedLinear) and m.activations != "float"]
    before = [layer.activations for layer in found]
    try:
        for layer in found:
            layer.activations = "float"
        yield {id(layer) for layer in found}
    finally:
        for layer, activations in zip(found, before, strict=True):
            layer.activations = activations


@torch.library.custom_op("sparlow::packed_linear", mutates_args=())
def _forward(x: Tensor, number: int, out: int) -> Tensor:  # noqa: ARG001 - for the shape
    found: Tensor = layer_of(number).product(x)
    return found


@torch.library.custom_op("sparlow::packed_linear_back", mutates_args=())
def _backward(dy: Tensor, number: int, columns: int) -> Tensor:  # noqa: ARG001 - for the shape
    found: Tensor = layer_of(number).back(dy)
    return found


def _shaped(x: Tensor, number: int, features: int) -> Tensor:  # noqa: ARG001 - an operator's form
    return x.new_empty(*x.shape[:-1], features)


def _remember(ctx: Any, inputs: tuple[Tensor, int, int], output: Tensor) -> None:  # noqa: ANN401, ARG001 - torch's form
    ctx.number, ctx.columns = inputs[1], inputs[0].shape[-1]


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401 - torch's form
    return torch.ops.sparlow.packed_linear_back(dy, ctx.number, ctx.columns), None, None


_forward.register_fake(_shaped)
_backward.register_fake(_shaped)
_forward.register_autograd(_gradient, setup_context=_remember)
