"""A matrix as it lies in a file, and what the kernel needs to know of it."""

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sparlow.errors import InputError
from sparlow.linalg.grid import Grid
from sparlow.runtime.build import Library

# In the order of ``enum kind`` in sparlow.h.
_FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
_CODES = {8: 4, 4: 5, 3: 6, 2: 7}
_BIASED = 128  # a byte stands for level + 128
_NARROW = 16  # codes that a table of bytes serves


class Struct(ctypes.Structure):
    """``matrix`` of sparlow.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("data", "start", "mask", "scale", "narrow", "wide")),
        *((name, ctypes.c_int64) for name in ("rows", "cols", "group", "groups", "each")),
        *((name, ctypes.c_int32) for name in ("kind", "scale_kind", "wide_kind", "pairs")),
        ("unit", ctypes.c_float),
    )


class Layer(ctypes.Structure):
    """``layer`` of sparlow.h."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("S", "V", "U", "fold", "bias"))


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix, its description for the kernel, and all tensors that this points to.

    Attributes:
        struct: For the kernel.
        shape: (rows, columns).
        tensors: Kept alive, as the kernel reads them.
        coded: Whether its levels are integers, so that rounded inputs may be used.
    """

    struct: Struct
    shape: tuple[int, int]
    tensors: tuple[Tensor, ...]
    coded: bool

    @property
    def at(self) -> int:
        """The address of the description."""
        return ctypes.addressof(self.struct)


def sparse_matrix(lib: Library, parts: Mapping[str, Tensor], shape: tuple[int, int], grid: Grid | None) -> Matrix:
    """Describe S.

    Args:
        lib: The kernel, which counts what the mask keeps.
        parts: ``weight`` and, as far as there are, ``mask``, ``scale``, ``book``.
        shape: (out, in).
        grid: That of the values; None for floats.

    Raises:
        InputError: The mask keeps another number of values than there are.
    """
    data, mask = parts["weight"].contiguous(), parts.get("mask")
    mask = None if mask is None else mask.contiguous()
    bits = grid.bits if grid else 8 * data.itemsize
    start = torch.empty(shape[0] + 1, dtype=torch.int64)
    pairs = lib.functions.sparlow_starts(address(mask), *shape, bits, start.data_ptr())
    if int(start[-1]) != data.nbytes:
        raise InputError(
            f"Its values should take {int(start[-1])} bytes, but there are {data.nbytes}. Restore the file."
        )
    struct = Struct(data=data.data_ptr(), start=start.data_ptr(), mask=address(mask))
    struct.rows, struct.cols, struct.pairs, struct.each = *shape, pairs, _each(start)
    if grid is None:
        return _finished(struct, shape, [data, start, mask], kind=_FLOATS[data.dtype])
    scale = parts["scale"].contiguous()
    narrow, wide, unit = _levels(grid, parts.get("book"))
    struct.scale, struct.scale_kind = scale.data_ptr(), _FLOATS[scale.dtype]
    struct.narrow, struct.wide, struct.unit = address(narrow), address(wide), unit
    struct.wide_kind = 0 if wide is None else _FLOATS[wide.dtype]
    struct.group, struct.groups = min(grid.group or shape[1], shape[1]), grid.groups(shape[1])
    return _finished(
        struct, shape, [data, start, mask, scale, narrow, wide], kind=_CODES[grid.bits], coded=wide is None
    )


def factor(part: Tensor) -> Matrix:
    """Describe U or V, whose scales are applied elsewhere."""
    data, shape = part.contiguous(), (part.shape[0], part.shape[1])
    start = torch.arange(shape[0] + 1) * (shape[1] * data.itemsize)
    struct = Struct(data=data.data_ptr(), start=start.data_ptr(), rows=shape[0], cols=shape[1])
    struct.each = _each(start)
    return _finished(struct, shape, [data, start], kind=_FLOATS[data.dtype])


def _each(start: Tensor) -> int:
    """Return the bytes of a row, given where each begins; 0 if some have more than others."""
    sizes = start.diff()
    return int(sizes[0]) if len(sizes) and bool((sizes == sizes[0]).all()) else 0


def _finished(
    struct: Struct, shape: tuple[int, int], tensors: list[Tensor | None], *, kind: int, coded: bool = False
) -> Matrix:
    struct.kind = kind
    if not struct.scale:
        struct.unit, struct.group, struct.groups = 1.0, shape[1], 1
    return Matrix(struct, shape, tuple(t for t in tensors if t is not None), coded)


def address(t: Tensor | None) -> int | None:
    """Return where a tensor lies; None for none."""
    return None if t is None else t.data_ptr()


def _levels(grid: Grid, book: Tensor | None) -> tuple[Tensor | None, Tensor | None, float]:
    """Return the levels by code as bytes (level / unit + 128), or else in 16 bits; and the unit.

    Bytes where they hold the levels exactly: halves are odd numbers of halves, and a learned book is taken to multiples
    of a 127th of its largest level if it consists of them.
    """
    levels = (grid.uniform() if book is None else book).float()
    if len(levels) > _NARROW and bool((levels + _BIASED == torch.arange(len(levels))).all()):
        return None, None, 1.0  # a code is its own byte
    for unit in (1.0, 0.5, float(levels.abs().max()) / 127) if len(levels) <= _NARROW else ():
        whole = (levels / unit).round() if unit else levels
        if bool((whole * unit == levels).all()) and bool((whole.abs() < _BIASED).all()):
            narrow = torch.zeros(_NARROW, dtype=torch.uint8)
            narrow[: len(levels)] = (whole + _BIASED).to(torch.uint8)
            return narrow, None, unit
    wide = torch.zeros(_NARROW**2, dtype=torch.bfloat16 if book is None else book.dtype)
    wide[: len(levels)] = levels.to(wide.dtype)
    return None, wide, 1.0
