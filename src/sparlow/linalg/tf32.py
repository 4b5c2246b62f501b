"""TF32 matrix products on CUDA, scoped; and a power of two that brings a tensor near 1."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

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
def exact_products() -> Iterator[None]:
    """Compute products of float32 numbers in float32, whatever the process was told before.

    A caller may have asked torch for TF32 or bfloat16, by its older functions or by ``fp32_precision``, which holds for
    every product of the process, on CUDA and with oneDNN on the CPU. A factorisation does not survive that.
    """
    with _products("ieee"):
        yield


@contextmanager
def rounded_products(device: torch.device) -> Iterator[None]:
    """Use TF32 for float32 matrix products on CUDA, for iterations that correct the rounding.

    On an H100 such products are six times as fast (benchmarks/accelerator.py). On other devices nothing changes.
    """
    if device.type != "cuda":
        yield
        return
    with _products("tf32"):
        yield


@contextmanager
def _products(precision: Literal["ieee", "tf32"]) -> Iterator[None]:
    """Set the precision of products of float32 numbers, and leave all settings as they were."""
    backends = _settings()
    if not backends:  # before torch 2.9
        level = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest" if precision == "ieee" else "high")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(level)
        return
    # the older getter raises where a caller has used the newer settings, so it is not asked
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = precision
    try:
        yield
    finally:
        for backend, own in zip(backends, before, strict=True):
            backend.fp32_precision = "none"  # which takes what is set for all backends
            if backend.fp32_precision != own:
                backend.fp32_precision = own


def _settings() -> list[Any]:
    """What has a ``fp32_precision`` for products, which replaces the older functions; nothing before torch 2.9."""
    backends: Any = torch.backends
    found = [backends.cuda.matmul, getattr(backends.mkldnn, "matmul", None)]
    return found if all(hasattr(backend, "fp32_precision") for backend in found) else []
