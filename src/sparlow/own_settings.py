"""The settings that sparlow computes under, whatever those of the process it is called in.

torch has settings of the whole process or thread that decide results: the default type and device, autocast, gradients,
how exactly matrices are multiplied, which kernels are allowed, the state of random generators. Every public function
that computes runs inside ``own_settings``, and leaves what it found.
"""

import os
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

from sparlow.errors import InputError

SEED = 0  # of what draws without a seed of its own
FAST_MATH = ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE")  # read once, when the library is loaded

# Of ``torch.backends``: what a process begins with that has changed nothing. Names that a release lacks are left out.
_FLAGS: dict[str, dict[str, Any]] = {
    "": {"fp32_precision": "none"},
    "mkldnn": {"fp32_precision": "none", "enabled": True, "deterministic": False},
    "mkldnn.conv": {"fp32_precision": "none"},
    "mkldnn.rnn": {"fp32_precision": "none"},
    "cudnn": {"fp32_precision": "none", "enabled": True, "benchmark": False, "deterministic": False},
    "cudnn.conv": {"fp32_precision": "tf32"},
    "cudnn.rnn": {"fp32_precision": "tf32"},
    "cuda.matmul": {
        "allow_fp16_reduced_precision_reduction": True,
        "allow_bf16_reduced_precision_reduction": True,
        "allow_fp16_accumulation": False,
    },
}
_MATMUL = ("mkldnn.matmul", "cuda.matmul")  # whose fp32_precision follows ``torch.set_float32_matmul_precision``
_ATTENTION = ("flash", "mem_efficient", "math", "cudnn")  # kernels, all of them allowed


@contextmanager
def own_settings() -> Iterator[None]:
    """Compute as in a fresh process, and leave all settings and random generators as they were.

    Raises:
        InputError: A setting that cannot be undone decides results.
    """
    for name in FAST_MATH:
        if os.environ.get(name, "STRICT").upper() not in ("", "STRICT"):
            raise InputError(f"{name}={os.environ[name]} lets float32 products be rounded. Unset it, and start again.")
    with ExitStack() as stack:
        for context in (_own_autograd, _own_kinds, _own_kernels, _own_precision, _own_draws):
            stack.enter_context(context())
        yield


@contextmanager
def _own_autograd() -> Iterator[None]:
    """No inference mode, gradients where they are asked for, no autocast."""
    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    kinds = {"cpu", "cpu" if there is None else there.type}
    casting = [kind for kind in kinds if torch.is_autocast_enabled(kind)]
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.enable_grad())
        for kind in casting:
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(np.errstate(divide="warn", over="warn", under="ignore", invalid="warn"))
        yield


@contextmanager
def _own_kinds() -> Iterator[None]:
    """New tensors are of float32 and on the CPU where nothing else is said."""
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


@contextmanager
def _own_kernels() -> Iterator[None]:
    """The kernels that torch chooses by itself."""
    with ExitStack() as undo:
        if torch.are_deterministic_algorithms_enabled():
            warn = torch.is_deterministic_algorithms_warn_only_enabled()
            undo.callback(torch.use_deterministic_algorithms, mode=True, warn_only=warn)
            torch.use_deterministic_algorithms(mode=False)
        for name in _ATTENTION:
            allowed: Callable[[], bool] | None = getattr(torch.backends.cuda, f"{name}_sdp_enabled", None)
            if allowed is not None and not allowed():
                allow = getattr(torch.backends.cuda, f"enable_{name}_sdp")
                undo.callback(allow, enabled=False)
                allow(enabled=True)
        for place, flags in _FLAGS.items():
            for name, value in flags.items():
                _set(undo, place, name, value)
        yield


@contextmanager
def _own_precision() -> Iterator[None]:
    """Products of float32 matrices are not rounded, whichever of torch's two ways to ask for that was taken."""
    before = {place: _get(place, "fp32_precision") for place in _MATMUL}
    legacy = _legacy_precision()
    if legacy != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if legacy not in (None, "highest"):
            torch.set_float32_matmul_precision(str(legacy))
        for place, value in before.items():
            if _get(place, "fp32_precision") != value:
                _module(place).fp32_precision = value


def _legacy_precision() -> str | None:
    """What ``torch.set_float32_matmul_precision`` was given; None where something else was asked for in another way."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


@contextmanager
def _own_draws() -> Iterator[None]:
    """Random generators begin at the same place, and the caller's stay where they are."""
    own, numbers = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global one, which libraries draw from
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        random.seed(SEED)
        np.random.seed(SEED)  # noqa: NPY002 - see above
        torch.default_generator.manual_seed(SEED)
        if devices:
            torch.cuda.manual_seed_all(SEED)
        try:
            yield
        finally:
            random.setstate(own)
            np.random.set_state(numbers)  # noqa: NPY002 - see above


def _module(place: str) -> Any:  # noqa: ANN401 - modules of torch with flags for attributes
    found: Any = torch.backends
    for name in filter(None, place.split(".")):
        found = getattr(found, name)
    return found


def _get(place: str, name: str) -> Any:  # noqa: ANN401 - True, False, or a word
    try:
        return getattr(_module(place), name)
    except (AttributeError, RuntimeError):  # a release without it
        return None


def _set(undo: ExitStack, place: str, name: str, value: object) -> None:
    """Set a flag that is not as it should be, until the stack ends."""
    found = _get(place, name)
    if found is not None and found != value:
        undo.callback(setattr, _module(place), name, found)
        setattr(_module(place), name, value)
