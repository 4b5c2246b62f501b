"""TF32 matrix products on CUDA, scoped; and a power of two that brings a tensor near 1."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def unit(A: Tensor) -> float:
    """Return the power of two at or below the largest magnitude in ``A``, of any shape; 1 if all of it is zero.

    Dividing by it loses no bit and brings the entries near 1, so that sums of their fourth powers, which the iterations
    here form, neither overflow nor underflow.
    """
    low, high = (bound.item() for bound in A.aminmax()) if A.numel() else (0.0, 0.0)
    largest = max(-low, high)
    if not 0 < largest < math.inf:
        return 1.0
    smallest: float = torch.finfo(A.dtype).tiny  # a normal number, and so is its inverse
    return min(max(2.0 ** (math.frexp(largest)[1] - 1), smallest), 1 / smallest)


@contextmanager
def rounded_products(device: torch.device) -> Iterator[None]:
    """Use TF32 for float32 matrix products on CUDA, for iterations that correct the rounding.

    On an H100 such products are six times as fast (benchmarks/accelerator.py). On other devices nothing changes.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
