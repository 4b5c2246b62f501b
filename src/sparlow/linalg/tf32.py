"""How exactly numbers are multiplied, and in what range."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def unit(A: Tensor) -> float:
    """The power of two at or below the largest magnitude in ``A``, whatever its shape; 1 if all is zero.

    What is divided by it lies near 1 and has lost no bit: sums of its fourth powers, such as the iterations here form,
    neither over- nor underflow.
    """
    low, high = (bound.item() for bound in A.aminmax()) if A.numel() else (0.0, 0.0)
    largest = max(-low, high)
    if not 0 < largest < math.inf:
        return 1.0
    smallest: float = torch.finfo(A.dtype).tiny  # a normal number, and so is its inverse
    return min(max(2.0 ** (math.frexp(largest)[1] - 1), smallest), 1 / smallest)


@contextmanager
def rounded_products(device: torch.device) -> Iterator[None]:
    """Let CUDA round the factors of float32 products to TF32, where an iteration corrects what that costs.

    On an H100 such products are six times as fast (benchmarks/accelerator.py). Elsewhere nothing changes.
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
