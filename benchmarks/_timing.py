"""How the benchmarks time a short call: warmed up, and until the device has done it."""

import time
from collections.abc import Callable

import torch

REPEATS = 5


def times(call: Callable[[], object], device: str | torch.device, repeats: int = REPEATS) -> list[float]:
    """Seconds of each of several calls; one more, before them, is not counted.

    Take the median for what a call usually takes, and the least for what the machine can do.
    """
    call()
    return [_once(call, torch.device(device)) for _ in range(repeats)]


def _once(call: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    """Until the device has done what it was asked to do; the CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
