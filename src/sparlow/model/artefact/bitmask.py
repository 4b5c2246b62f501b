"""A sparse matrix ⇄ its kept values and one bit for each entry.

``values`` holds the kept entries row by row, columns rising. Bit j (of value 2ʲ) of byte b in a row of ``mask`` says
whether column 8 b + j is kept; bits past the last column are zero. 2:4 at 16 bits a value costs 9 bits an entry.
"""

from collections.abc import Iterator, Sequence
from functools import reduce
from operator import or_

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from sparlow.errors import InputError

# Positions of kept entries take 8 bytes each; slices of this many entries bound them to 32 MiB.
_ENTRIES_AT_A_TIME = 1 << 22


def pack(S: Tensor) -> tuple[Tensor, Tensor]:
    """Return the values of S (out, in) that are not zero, and where they are.

    Returns:
        values (kept,) in S's dtype and mask (out, ⌈in/8⌉) uint8, on S's device. -0.0 counts as zero.

    Raises:
        InputError: S is no matrix.
    """
    if S.ndim != 2:  # noqa: PLR2004 - a matrix
        raise InputError(f"Only a matrix can be packed, not a tensor of shape {tuple(S.shape)}.")
    values, masks = [], []
    for rows in torch.split(S.detach(), rows_at_a_time(S.shape[1])):
        keep = rows != 0
        values.append(rows.flatten().index_select(0, positions_of(keep)))
        masks.append(bytes_of_bits(keep))
    return torch.cat(values), torch.cat(masks)


def unpack(values: Tensor, mask: Tensor | None, shape: Sequence[int]) -> Tensor:
    """Return the matrix (out, in) that ``pack`` took apart; every zero in it is +0.0.

    Args:
        values: (kept,), any float dtype.
        mask: (out, ⌈in/8⌉) uint8, on the same device; None where every entry is kept.
        shape: (out, in).

    Raises:
        InputError: The parts do not fit each other or the shape.
    """
    out, features = shape
    if mask is None:
        if values.shape != (out * features,):
            raise InputError(
                f"All entries of a ({out}, {features}) matrix are kept, but there are {values.numel()} values."
            )
        return values.reshape(out, features) + 0.0
    if values.ndim != 1:
        raise InputError(f"Packed values must be a vector, not of shape {tuple(values.shape)}.")
    check_mask(mask, out, features)
    S = torch.zeros(out, features, dtype=values.dtype, device=values.device)
    start = 0
    for entries, positions in _positions_by_rows(S, mask):
        stop = start + len(positions)
        if stop <= len(values):  # otherwise only count on, for the message
            entries.index_copy_(0, positions, values[start:stop] + 0.0)  # a cast may have made a -0.0
        start = stop
    if start != len(values):
        raise InputError(f"The mask keeps {start} entries, but there are {len(values)} values.")
    return S


def mask_bytes(features: int) -> int:
    """Return the bytes of one row of a mask: a bit an entry, filled up to whole bytes."""
    return -(-features // 8)


def check_mask(mask: Tensor, out: int, features: int) -> None:
    """See that a mask is one of a matrix (out, features).

    Raises:
        InputError: It is not.
    """
    size = mask_bytes(features)
    if mask.dtype != torch.uint8 or mask.shape != (out, size):
        found = f"{tuple(mask.shape)} {mask.dtype}"
        raise InputError(f"The mask of a ({out}, {features}) matrix must be ({out}, {size}) uint8, not {found}.")
    if features % 8 and (mask[:, -1] >> (features % 8)).any():
        raise InputError(f"The mask keeps entries past the last of {features} columns.")


def _positions_by_rows(S: Tensor, mask: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield flat views of some rows of S and the positions in them that the mask keeps."""
    size = rows_at_a_time(S.shape[1])
    for rows, packed in zip(torch.split(S, size), torch.split(mask, size), strict=True):
        yield rows.view(-1), positions_of(bits_of_bytes(packed, S.shape[1]))


def rows_at_a_time(features: int) -> int:
    """Return how many rows of so many columns are worked on at once."""
    return max(1, _ENTRIES_AT_A_TIME // max(1, features))


def positions_of(keep: Tensor) -> Tensor:
    """Return where the flattened mask is true, int64; on the CPU numpy is ten times faster than torch at this."""
    flat = keep.flatten()
    return torch.from_numpy(np.flatnonzero(flat.numpy())) if flat.is_cpu else flat.nonzero().squeeze(1)


def bytes_of_bits(keep: Tensor) -> Tensor:
    """Return (rows, ⌈in/8⌉) uint8 for (rows, in) bool."""
    rows, features = keep.shape
    bits = functional.pad(keep.to(torch.uint8), (0, -features % 8)).reshape(rows, mask_bytes(features), 8)
    return reduce(or_, (bits[..., j] << j for j in range(8)))


def bits_of_bytes(mask: Tensor, features: int) -> Tensor:
    """Return (rows, in) bool for (rows, ⌈in/8⌉) uint8."""
    bits = (mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1  # (rows, ⌈in/8⌉, 8)
    return bits.reshape(len(mask), 8 * mask.shape[1])[:, :features].bool()
