"""y = x Wᵀ + b by the kernel, for a weight as it is stored: few tokens at once, or many by tiles of rows.

Layers that read one input are multiplied by it in one call: ``joined`` describes them once, and ``products`` is for a
single use.
"""

import ctypes
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sparlow.errors import InputError
from sparlow.finite import all_finite
from sparlow.linalg.grid import Grid
from sparlow.runtime.build import PATHS, Library, library
from sparlow.runtime.matrix import Layer, Matrix, address, factor, sparse_matrix
from sparlow.runtime.openmp import use_torchs_threads
from sparlow.runtime.which import PATH

TOKENS = 8  # that one call of the kernel takes; more are quicker by tiles
# entries of a tile, which stays in a cache until it is multiplied; each tile reads all of the inputs again, so it is
# larger for many tokens (measured by benchmarks/kernel.py --tokens 512 --inputs bf16)
_TILE, _LARGE_TILE, _MANY_TOKENS = 1 << 20, 1 << 21, 256
_HERE: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever the caller has set as defaults
_forced: ContextVar[str | None] = ContextVar("path", default=None)


@contextmanager
def forced(path: str) -> Iterator[None]:
    """Within this context, products are computed by one of ``build.PATHS``.

    Raises:
        InputError: This processor does not have it.
    """
    path_number(library(), path)
    token = _forced.set(path)
    try:
        yield
    finally:
        _forced.reset(token)


def path_number(lib: Library, asked: str | None = None) -> int:
    """Return the number by which the kernel knows the path to take: the one asked for, forced, or else the best.

    Raises:
        InputError: This processor does not have it.
    """
    name = asked or _forced.get() or os.environ.get(PATH) or lib.paths[-1]
    if name not in lib.paths:
        raise InputError(f"There is no kernel for {name} on this processor. Choose one of {', '.join(lib.paths)}.")
    return PATHS.index(name)


@dataclass(frozen=True)
class Operand:
    """A weight S + U V with its bias, described for the kernel.

    Attributes:
        lib: The kernel.
        S: (out, in).
        U: (out, rank), its numbers as stored; None at rank 0.
        V: (rank, in), the same.
        fold: (rank,) float32, what U V is multiplied by between the two; None for 1.
        bias: (out,) float32, or None.
    """

    lib: Library
    S: Matrix
    U: Matrix | None
    V: Matrix | None
    fold: Tensor | None
    bias: Tensor | None

    def product(self, x: Tensor, *, rounded: bool = False) -> Tensor:
        """Return x Wᵀ + b (tokens, out) in float32.

        Args:
            x: (tokens, in) float32, contiguous; or in bfloat16, see ``Joined.product``.
            rounded: Round x to int8, a scale for each token and 128 columns, where the levels of S are integers.
        """
        return Joined((self,), self._alone, (self.S.shape[0],)).product(x, rounded=rounded)

    @cached_property
    def _alone(self) -> "ctypes.Array[Layer]":
        return (Layer * 1)(_layer(self))

    def by_tiles(self, x: Tensor, y: Tensor) -> None:
        """Write the product to y (tokens, out) float32, in which a row may be part of a wider one."""
        left = self._left(x, self.U, self.V) if self.U and self.V else None
        for rows, tile in self.tiles(len(x), x.dtype):
            part = x @ tile.T if x.dtype == torch.bfloat16 else torch.mm(x, tile.T, out=y[:, rows])
            if left is not None:
                part.addmm_(left[0], left[1][rows].T)
            if x.dtype == torch.bfloat16:
                y[:, rows] = part
        if self.bias is not None:
            y.add_(self.bias)

    def _left(self, x: Tensor, U: Matrix, V: Matrix) -> tuple[Tensor, Tensor]:
        """Return x Vᵀ (tokens, rank), folded, and U (out, rank), in the type of x, which multiplies faster."""
        left, right = (self.decoded(m, out=torch.empty(m.shape, dtype=x.dtype, device="cpu")) for m in (U, V))
        t = x @ right.T
        return t if self.fold is None else (t.float() * self.fold).to(x.dtype), left

    def back(self, dy: Tensor) -> Tensor:
        """Return dy W (tokens, in) for dy (tokens, out) float32."""
        dx = torch.zeros(len(dy), self.S.shape[1], **_HERE)
        for rows, tile in self.tiles(len(dy)):
            dx.addmm_(dy[:, rows], tile)
        if self.U and self.V:
            t = dy @ self.decoded(self.U)
            dx.addmm_(t if self.fold is None else t * self.fold, self.decoded(self.V))
        return dx

    def rows(self, ids: Tensor) -> Tensor:
        """Return rows (ids, in) of S in float32 for int64 ids, each of which is checked by the caller."""
        found = torch.empty(len(ids), self.S.shape[1], **_HERE)
        if found.numel():
            self.lib.functions.sparlow_rows(
                path_number(self.lib), torch.get_num_threads(), self.S.at, ids.data_ptr(), len(ids), found.data_ptr()
            )
        return found

    def tiles(self, tokens: int, dtype: torch.dtype = torch.float32) -> Iterator[tuple[slice, Tensor]]:
        """Yield some rows of S after the other in float32 or bfloat16, with their place; all have one buffer."""
        out, columns = self.S.shape
        entries = _TILE if tokens < _MANY_TOKENS else _LARGE_TILE
        size = max(1, min(out, entries // max(columns, 1)))
        buffer = torch.empty(size, columns, dtype=dtype, device="cpu")
        for start in range(0, out, size):
            stop = min(out, start + size)
            yield slice(start, stop), self.decoded(self.S, start, stop, buffer[: stop - start])

    def decoded(self, matrix: Matrix, start: int = 0, stop: int | None = None, out: Tensor | None = None) -> Tensor:
        """Return rows of a matrix in float32, or in the type of ``out``, bfloat16 being rounded to nearest."""
        stop = matrix.shape[0] if stop is None else stop
        found = torch.empty(stop - start, matrix.shape[1], **_HERE) if out is None else out
        if found.numel():
            self.lib.functions.sparlow_decode(
                path_number(self.lib), torch.get_num_threads(), matrix.at, start, stop,
                found.dtype == torch.bfloat16, found.data_ptr(),
            )  # fmt: skip
        return found


@dataclass(frozen=True, slots=True)
class Joined:
    """Weights that are multiplied by one input in one call.

    Attributes:
        operands: The weights, all with the same columns.
        layers: Their descriptions for the kernel, one behind the other.
        sizes: The rows of each.
    """

    operands: tuple[Operand, ...]
    layers: ctypes.Array[Layer]
    sizes: tuple[int, ...]

    def product(self, x: Tensor, *, rounded: bool = False) -> Tensor:
        """Return x Wᵀ + b (tokens, rows of all) in float32, that of each weight beside the one before.

        Args:
            x: (tokens, in) float32, contiguous; or in bfloat16, to which S, U, V and V x are rounded for many tokens.
            rounded: Round x to int8, a scale for each token and 128 columns, where the levels of an S are integers.
        """
        if len(x) <= TOKENS:
            x = x.float()
        y = torch.empty(len(x), sum(self.sizes), **_HERE)
        if len(x) > TOKENS:
            for operand, part in zip(self.operands, y.split(self.sizes, 1), strict=True):
                operand.by_tiles(x, part)
            return y
        if not y.numel():
            return y
        lib = self.operands[0].lib
        failed = lib.functions.sparlow_products(
            path_number(lib), torch.get_num_threads(), rounded, self.layers, len(self.layers),
            x.data_ptr(), len(x), y.data_ptr(), y.shape[1],
        )  # fmt: skip
        if failed:
            raise MemoryError("There is no memory for a product of a packed layer.")
        return y


def joined(operands: Sequence[Operand]) -> Joined:
    """Describe weights that read one input, such as those of queries, keys and values, to be multiplied in one call.

    Raises:
        InputError: They have other numbers of columns.
    """
    if len({weight.S.shape[1] for weight in operands}) != 1:
        raise InputError("Weights that read one input must have one number of columns. Multiply them one by one.")
    layers = (Layer * len(operands))(*(_layer(weight) for weight in operands))
    return Joined(tuple(operands), layers, tuple(weight.S.shape[0] for weight in operands))


def _layer(weight: Operand) -> Layer:
    V, U = (part.at if part else None for part in (weight.V, weight.U))
    return Layer(weight.S.at, V, U, address(weight.fold), address(weight.bias))


def products(operands: Sequence[Operand], x: Tensor, *, rounded: bool = False) -> list[Tensor]:
    """Return x Wᵀ + b (tokens, out) of each weight in float32, in one call; the results lie beside each other.

    Args:
        operands: Weights with the columns of x.
        x: (tokens, in) float32, contiguous.
        rounded: As in ``Joined.product``.

    Raises:
        InputError: The weights have other numbers of columns.
    """
    together = joined(operands)
    return list(together.product(x, rounded=rounded).split(together.sizes, 1))


def operand(parts: Mapping[str, Tensor], shape: tuple[int, int], grid: Grid | None, bias: Tensor | None) -> Operand:
    """Describe a weight for the kernel, without copying what is large.

    Args:
        parts: Its tensors on the CPU by the last part of their names, types and shapes checked.
        shape: (out, in).
        grid: That of the values; None for floats.
        bias: (out,), or None.

    Raises:
        InputError: The values do not fit the mask, or scales or books are not finite.
    """
    if elsewhere := next((part for part, tensor in parts.items() if not tensor.is_cpu), None):
        raise InputError(f"Its {elsewhere} is not in the CPU's memory. Open the model with mode='dense' there.")
    lib = library()
    use_torchs_threads(lib)
    with torch.device("cpu"):  # while a model is opened, the default is the meta device
        return _operand(lib, parts, shape, grid, bias)


def _operand(
    lib: Library, parts: Mapping[str, Tensor], shape: tuple[int, int], grid: Grid | None, bias: Tensor | None
) -> Operand:
    for part in ("scale", "book", "U_scale", "V_scale"):
        if part in parts and not all_finite(parts[part]):
            raise InputError(f"Its {part} holds numbers that are not finite. Restore the file.")
    U, V = (factor(parts[part]) if parts["V"].shape[0] else None for part in ("U", "V"))
    fold = (parts["U_scale"].float() * parts["V_scale"].float()).contiguous() if "U_scale" in parts else None
    own = None if bias is None else bias.detach().float().contiguous()
    return Operand(lib, sparse_matrix(lib, parts, shape, grid), U, V, fold, own)
