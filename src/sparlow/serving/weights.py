"""The weights of one layer of a server: one or several stored ones, left to the kernel or expanded to a dense one."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from sparlow.errors import InputError
from sparlow.model.artefact.schemes import StoredLayer
from sparlow.model.artefact.shards import Header, check_parts
from sparlow.model.artefact.stored_form import unpack_weight
from sparlow.runtime.product import Joined, Operand, joined, operand

_numbers = itertools.count()
_packed: WeakValueDictionary[int, "Packed"] = WeakValueDictionary()  # by number, which a compiled graph can hold


@dataclass
class Stored:
    """One stored weight of a layer, while its tensors come in.

    Attributes:
        name: In the files.
        records: The ways in which it may be stored; none for plain numbers.
        shape: (out, in).
        tensors: By the last part of their names.
    """

    name: str
    records: Sequence[StoredLayer]
    shape: tuple[int, int]
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def record(self) -> StoredLayer | None:
        """Return how it is stored, after comparing all that came with it; None for plain numbers.

        Raises:
            InputError: Tensors are missing, too many, or of another shape or type.
        """
        whole = self.tensors.get("weight")
        if self.tensors.keys() == {"weight"} and whole is not None and whole.shape == self.shape:
            return None
        headers = {part: Header(Path(), t.dtype, tuple(t.shape)) for part, t in self.tensors.items()}
        problem = InputError(f"{self.name} should be a weight of the shape {self.shape}. Restore the files.")
        for record in self.records:
            try:
                check_parts(self.name, headers, record, shape=self.shape, bias=False)
            except InputError as found:
                problem = found
            else:
                return record
        raise problem

    def operand(self) -> Operand:
        """Describe it for the kernel.

        Raises:
            InputError: It is damaged, there is no kernel, or it has numbers of 64 bits.
        """
        record = self.record()
        parts = {part: t.contiguous() for part, t in self.tensors.items()}
        if record is None:
            W = parts["weight"]
            parts = {"weight": W.view(-1), "U": W.new_empty(len(W), 0), "V": W.new_empty(0, W.shape[1])}
        try:
            return operand(parts, self.shape, record.scheme.grid if record else None, None)
        except InputError as problem:
            raise type(problem)(f"{self.name}: {problem}") from None

    def dense(self) -> Tensor:
        """Return S + U V (out, in) in float32.

        Raises:
            InputError: It is damaged.
        """
        record = self.record()
        if record is None:
            return self.tensors["weight"].float()
        try:
            (S, U, V), _ = unpack_weight(self.tensors, self.shape, record.scheme.grid, record.scheme.dtype)
        except InputError as problem:
            raise InputError(f"{self.name}: {problem}") from None
        return S.float() + U.float() @ V.float()

    @property
    def decoded(self) -> torch.dtype:
        """The type to which its numbers are rounded where they are expanded."""
        record = self.record()
        return self.tensors["weight"].dtype if record is None else record.scheme.dtype

    @property
    def wide(self) -> bool:
        """Whether it has numbers of 64 bits, which the kernel does not read."""
        return any(t.dtype == torch.float64 for t in self.tensors.values())


class Packed:
    """Weights that stay as they are stored and are multiplied by one input, on the CPU.

    Args:
        weights: One below the other.
        inputs: ``float``; or ``int8``: those of up to 8 tokens are rounded, see ``PackedLinear``.

    Raises:
        InputError: They are damaged, or there is no kernel on this machine.
    """

    def __init__(self, weights: Sequence[Stored], inputs: str = "float") -> None:
        self.rounded = inputs == "int8"
        self.joined: Joined = joined([weight.operand() for weight in weights])
        self.shape = (sum(self.joined.sizes), weights[0].shape[1])
        self.decoded = weights[0].decoded
        self.bytes = sum(t.nbytes for weight in weights for t in weight.tensors.values())
        number = next(_numbers)
        _packed[number] = self
        self.handle = torch.tensor([number], device="cpu")  # a tensor, so that equal layers are one compiled graph

    def product(self, x: Tensor) -> Tensor:
        """Return x Wᵀ (…, out) in the type of x."""
        if torch.compiler.is_compiling():
            y: Tensor = torch.ops.sparlow.served_product(x, self.handle, self.shape[0])
            return y
        return _product(x, self)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the rows (…, in) of ids, with the numbers that the expanded weight has."""
        if torch.compiler.is_compiling():
            found: Tensor = torch.ops.sparlow.served_rows(ids, self.handle, self.shape[1])
        else:
            found = _rows(ids, self)
        return found.to(self.decoded).to(dtype)


def _product(x: Tensor, weights: Packed) -> Tensor:
    flat = x.detach().reshape(-1, x.shape[-1]).float().contiguous()
    return weights.joined.product(flat, rounded=weights.rounded).view(*x.shape[:-1], weights.shape[0]).to(x.dtype)


def _rows(ids: Tensor, weights: Packed) -> Tensor:
    flat = ids.reshape(-1).long().contiguous()
    if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < weights.shape[0]:
        raise InputError(
            f"A token id is not in the vocabulary of {weights.shape[0]} tokens. Use the model's own tokenizer."
        )
    (only,) = weights.joined.operands
    return only.rows(flat).view(*ids.shape, weights.shape[1])


@torch.library.custom_op("sparlow::served_product", mutates_args=())
def _served_product(x: Tensor, handle: Tensor, out: int) -> Tensor:  # noqa: ARG001 - for the shape
    return _product(x, _packed[int(handle)])


@torch.library.custom_op("sparlow::served_rows", mutates_args=())
def _served_rows(ids: Tensor, handle: Tensor, columns: int) -> Tensor:  # noqa: ARG001 - for the shape
    return _rows(ids, _packed[int(handle)])


@_served_product.register_fake
def _(x: Tensor, handle: Tensor, out: int) -> Tensor:  # noqa: ARG001 - an operator's form
    return x.new_empty(*x.shape[:-1], out)


@_served_rows.register_fake
def _(ids: Tensor, handle: Tensor, columns: int) -> Tensor:  # noqa: ARG001 - an operator's form
    return ids.new_empty(*ids.shape, columns, dtype=torch.float32)


def expanded(weights: Mapping[str, Stored], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the weights as one dense one (out, in), rounded once.

    Raises:
        InputError: They are damaged.
    """
    return torch.cat([weight.dense() for weight in weights.values()]).to(dtype).to(device)
