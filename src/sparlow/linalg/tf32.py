"""How exactly an accelerator multiplies."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
