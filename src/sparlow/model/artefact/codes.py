"""Codes of 8, 4, 3 or 2 bits ⇄ bytes: least significant bits first, and each row begins on a byte.

Code i of a row has the bits i·b … i·b + b − 1 of the row, bit k of the row being bit k mod 8 of its byte ⌊k/8⌋. What a
row's last byte has left over is zero. Rows may hold different numbers of codes, as a free pattern leaves them.
"""

from collections.abc import Iterator
from functools import reduce
from operator import or_

import torch
from torch import Tensor
from torch.nn import functional

from sparlow.errors import InputError

_CODES = {8: 1, 4: 2, 3: 8, 2: 4}  # by bits: so many codes fill whole bytes
_BYTES = {8: 1, 4: 1, 3: 3, 2: 1}  # and these are so many
_CODES_AT_A_TIME = 1 << 22  # their positions take 8 bytes each


def row_bytes(counts: Tensor, bits: int) -> Tensor:
    """Return the bytes of rows of so many codes; int64, of the shape of ``counts``."""
    return (counts * bits + 7) // 8


def pack_codes(codes: Tensor, counts: Tensor, bits: int) -> Tensor:
    """Return the bytes (n,) uint8 of codes (m,) uint8, row after row.

    Args:
        codes: Each less than 2^bits.
        counts: (rows,) int64, the codes of each row; they add up to m.
        bits: 8, 4, 3 or 2.
    """
    if bits == 8:  # noqa: PLR2004 - a code is a byte
        return codes
    found, start = [], 0
    for some in _some_rows(counts):
        stop = start + int(some.sum())
        found.append(_pack(codes[start:stop], some, bits))
        start = stop
    return torch.cat(found) if found else codes[:0]


def unpack_codes(data: Tensor, counts: Tensor, bits: int) -> Tensor:
    """Return the codes (m,) uint8 that ``pack_codes`` packed.

    Args:
        data: (n,) uint8, on the device of ``counts``.
        counts: (rows,) int64, the codes of each row.
        bits: 8, 4, 3 or 2.

    Raises:
        InputError: There are more or fewer bytes than so many codes take, or what a row has left over is not zero.
    """
    total = int(row_bytes(counts, bits).sum())
    if data.shape != (total,):
        raise InputError(f"Its codes should take {total} bytes, but there are {data.numel()}. Restore the file.")
    if bits == 8:  # noqa: PLR2004 - a code is a byte
        return data
    found, start = [], 0
    for some in _some_rows(counts):
        stop = start + int(row_bytes(some, bits).sum())
        found.append(_unpack(data[start:stop], some, bits))
        start = stop
    return torch.cat(found) if found else data


def _some_rows(counts: Tensor) -> Iterator[Tensor]:
    """Yield the counts of consecutive rows, together about ``_CODES_AT_A_TIME`` codes."""
    widest = int(counts.max()) if len(counts) else 0
    if widest:
        yield from torch.split(counts, max(1, _CODES_AT_A_TIME // widest))


def _pack(codes: Tensor, counts: Tensor, bits: int) -> Tensor:
    units, size = -(-counts // _CODES[bits]), row_bytes(counts, bits)
    filled = _spread(codes, counts, units * _CODES[bits]).view(-1, _CODES[bits])
    word = torch.uint8 if _BYTES[bits] == 1 else torch.int32
    words = reduce(or_, (filled[:, k].to(word) << (bits * k) for k in range(_CODES[bits])))
    if word == torch.int32:
        words = torch.stack([(words >> (8 * k)).to(torch.uint8) for k in range(_BYTES[bits])], dim=1).view(-1)
    return _gather(words, size, units * _BYTES[bits])


def _unpack(data: Tensor, counts: Tensor, bits: int) -> Tensor:
    units, size = -(-counts // _CODES[bits]), row_bytes(counts, bits)
    parts = _spread(data, size, units * _BYTES[bits]).view(-1, _BYTES[bits])
    words = reduce(or_, (parts[:, k].int() << (8 * k) for k in range(_BYTES[bits]))) if bits == 3 else parts[:, 0]  # noqa: PLR2004 - the only one of several bytes
    mask = (1 << bits) - 1
    filled = torch.stack([((words >> (bits * k)) & mask).to(torch.uint8) for k in range(_CODES[bits])], dim=1).view(-1)
    codes = _gather(filled, counts, units * _CODES[bits])
    if int(filled.count_nonzero()) != int(codes.count_nonzero()):
        raise InputError("Its codes go on past the end of a row. Restore the file.")
    return codes


def _spread(flat: Tensor, counts: Tensor, room: Tensor) -> Tensor:
    """Give each row of ``counts`` entries the ``room`` it needs, the rest zero."""
    first = int(counts[0])
    if bool((counts == first).all()):
        return functional.pad(flat.view(len(counts), first), (0, int(room[0]) - first)).view(-1)
    wide = flat.new_zeros(int(room.sum()))
    wide[_places(counts, room)] = flat
    return wide


def _gather(wide: Tensor, counts: Tensor, room: Tensor) -> Tensor:
    """Undo ``_spread``."""
    first = int(counts[0])
    if bool((counts == first).all()):
        return wide.view(len(counts), int(room[0]))[:, :first].reshape(-1)
    return wide[_places(counts, room)]


def _places(counts: Tensor, room: Tensor) -> Tensor:
    """Return where each entry of rows of ``counts`` lies if each row has so much ``room``; int64."""
    shift = (room.cumsum(0) - room) - (counts.cumsum(0) - counts)
    return torch.arange(int(counts.sum()), device=counts.device) + shift.repeat_interleave(counts)
