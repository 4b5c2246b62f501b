"""Values on a grid: one of a few levels, times a scale that some columns of a row share.

    S_ij = scale_{i, ⌊j / group⌋} · levels[code_ij]

Only this file knows what int4 means, as only ``patterns.py`` knows what 2:4 means; what S may be is pattern ∩ grid.
Levels are one of three kinds, b being the bits of a code c:

* ``integer``: c − 2^(b−1), the lowest unused (−127 … 127, −7 … 7), which other programs read;
* ``half``: c − 2^(b−1) + ½, symmetric and without zero;
* ``book``: 2^b levels ±m_k learned for each layer, the best up to four bits (at four, SmolLM2 whole: divergence on text
  that nothing was chosen on 0.050 beside 0.060 with ``half``).

Where entries are pruned, a mask says where, and what is kept is never zero: the level 0 is not used then.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from sparlow.errors import InputError
from sparlow.linalg.portions import portion

BITS = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}  # by the name of the values
LEVELS = ("integer", "half", "book")
BEST_LEVELS = {8: "integer", 4: "book", 3: "book", 2: "book"}  # by bits
GROUP = 128  # columns that share a scale, where nothing is asked for
WHOLE_ROW = "row"
SCALE_BITS = 16
_COUNTED, _AT_A_TIME = 15, 1 << 16  # thresholds that are counted one by one, and entries at once


@dataclass(frozen=True, slots=True)
class Grid:
    """Which grid the values of S are to lie on.

    Attributes:
        bits: Of a code: 8, 4, 3 or 2.
        levels: The kind of levels, one of ``LEVELS``.
        group: Consecutive columns of a row that share a scale; None for the whole row.
    """

    bits: int
    levels: str
    group: int | None = GROUP

    @property
    def name(self) -> str:
        """``int4`` and the like."""
        return f"int{self.bits}"

    def groups(self, columns: int) -> int:
        """Scales of a row of so many columns."""
        return -(-columns // self.group) if self.group else 1

    def bytes(self, shape: tuple[int, int], kept_of_row: float) -> float:
        """Bytes of codes, scales and book of a weight (out, in) that keeps so many entries of a row on average."""
        out, columns = shape
        book = (1 << self.bits) * SCALE_BITS / 8 if self.levels == "book" else 0
        return out * (-(-kept_of_row * self.bits // 8) + self.groups(columns) * SCALE_BITS / 8) + book

    def uniform(self) -> Tensor:
        """Return the levels (2^bits,), rising, of a kind that is not learned; of a book, where learning begins."""
        count = 1 << self.bits
        shift = 0.0 if self.levels == "integer" else 0.5
        return torch.arange(count, dtype=torch.float32) - count // 2 + shift


@dataclass(frozen=True, slots=True, eq=False)
class GridValues:
    """The grid that the values of one S (out, in) lie on.

    Attributes:
        grid: What was asked for.
        scale: (out, groups), in a type of 16 bits or more: what is stored.
        levels: (2^bits,), rising, in the same type.
        masked: Whether entries are pruned; if not, every entry has a code.
    """

    grid: Grid
    scale: Tensor
    levels: Tensor
    masked: bool

    def steps(self, columns: int) -> Tensor:
        """Return the scale of each entry (out, columns), in float32."""
        return self.scale.float().repeat_interleave(min(self.grid.group or columns, columns), 1)[:, :columns]

    def usable(self) -> Tensor:
        """Return the numbers (n,) int64 of the levels that a value may have."""
        numbers = torch.arange(len(self.levels), device=self.levels.device)
        if self.grid.levels != "integer":
            return numbers
        numbers = numbers[1:]  # of −128 … 127 the lowest is not used
        return numbers[self.levels[numbers] != 0] if self.masked else numbers

    def decode(self, codes: Tensor) -> Tensor:
        """Return the values (out, in) of codes (out, in), in float32."""
        return self.levels.float()[codes.long()] * self.steps(codes.shape[1])

    def encode(self, S: Tensor) -> Tensor:
        """Return the code (out, in) uint8 of the level nearest to each entry of S (out, in), pruned ones included."""
        numbers = self.usable()
        levels = self.levels.float()[numbers]
        steps = self.steps(S.shape[1])
        z = S.float().div(steps.masked_fill_(steps == 0, 1.0))
        return numbers.to(torch.uint8)[_passed(z, (levels[1:] + levels[:-1]) / 2).int()]


@dataclass(frozen=True, slots=True, eq=False)
class FactorScales:
    """Scales of U and V in int8: U_ik = U_scale_k · u_ik and V_kj = V_scale_k · v_kj with u, v in −127 … 127.

    Attributes:
        U: (rank,), of the columns of U.
        V: (rank,), of the rows of V.
    """

    U: Tensor
    V: Tensor


def make_grid(values: str, levels: str = "auto", group: str | int = GROUP) -> Grid | None:
    """Return the grid that options name; None for values in the model's own type.

    Args:
        values: ``int8``, ``int4``, ``int3``, ``int2``, or ``model``.
        levels: One of ``LEVELS``, or ``auto`` for the best of so many bits.
        group: Columns that share a scale, or ``row``.

    Raises:
        InputError: There is no such grid.
    """
    if values == "model":
        return None
    if values not in BITS or levels not in ("auto", *LEVELS):
        raise InputError(f"There is no grid of {values} with the levels {levels}. Give int8, int4, int3 or int2.")
    if str(group) != WHOLE_ROW and (not str(group).isdecimal() or int(group) < 1):
        raise InputError(f"A scale cannot be shared by {group} columns. Give a number of columns, or row.")
    bits = BITS[values]
    return Grid(bits, BEST_LEVELS[bits] if levels == "auto" else levels, None if group == WHOLE_ROW else int(group))


def _passed(z: Tensor, middles: Tensor) -> Tensor:
    """Return how many of the rising ``middles`` are below each entry of z (out, in), as bucketize does.

    Counting takes a tenth of its time for the few of a small grid, some rows at once so that they stay in the cache.
    """
    if len(middles) > _COUNTED:
        return torch.bucketize(z.contiguous(), middles)
    found = torch.empty(z.shape, dtype=torch.uint8, device=z.device)
    size = max(portion(_AT_A_TIME) // max(z.shape[1], 1), 1)
    for some, rows in zip(found.split(size), z.split(size), strict=True):
        count, over = torch.zeros_like(rows), torch.empty_like(rows)
        for middle in middles.unbind():
            count += torch.gt(rows, middle, out=over)
        some.copy_(count)
    return found


def packed_row_bytes(kept: int, bits: int) -> int:
    """Return the bytes of a row of so many codes: each row begins on a byte."""
    return -(-kept * bits // 8)


def factor_bytes(shape: tuple[int, int], rank: int) -> int:
    """Return the bytes of U and V of a weight (out, in) in int8, their scales included."""
    return rank * sum(shape) + 2 * rank * SCALE_BITS // 8 if prod(shape) else 0
