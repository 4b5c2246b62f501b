"""Sizes of a file as they are typed."""

import re

from sparlow.errors import InputError
from sparlow.schema import shown

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIZE = re.compile(rf"(\d{{1,15}}(?:\.\d{{1,15}})?) ?(%|{'|'.join(UNITS)})", re.IGNORECASE)


def parse_size(text: str, dense: int) -> int:
    """Return the bytes that a size stands for.

    Args:
        text: ``300MB``, ``1.5 GB``, or ``35%`` of the dense model.
        dense: Bytes of the dense model.

    Raises:
        InputError: It is no size.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None or not float(found[1]):
        raise InputError(
            f"--size {shown(text)} is not understood. Give bytes such as 300MB, or 35% of the dense model's."
        )
    number, unit = float(found[1]), found[2].upper()
    return int(number / 100 * dense) if unit == "%" else int(number * UNITS[unit])
