"""The machine a run is on: device, memory and disk that are free, peaks, versions."""

import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from sparlow.distributed import local_device, on_this_machine
from sparlow.errors import InputError, first_line

CGROUPS = Path("/sys/fs/cgroup")


def versions() -> dict[str, str]:
    """Versions of what computed the result."""
    packages = {name: version(name) for name in ("sparlow", "torch", "transformers", "safetensors")}
    return {**packages, "python": platform.python_version()}


def machine() -> dict[str, Any]:
    """What it was computed on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"system": platform.platform(), "threads": torch.get_num_threads(), "accelerator": device}


def pick_device(name: str) -> str:
    """Resolve "auto": an accelerator if there is one, else the CPU; of several, this process's own."""
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        name = "cpu" if accelerator is None else accelerator.type
    return local_device(name)


def computing_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the type to compute in with weights of a type: float32 for half precision on the CPU, else the same.

    On the CPU half precision is two to eight times slower than float32. Every half-precision number is a float32 one,
    so nothing is lost.
    """
    half = stored in (torch.float16, torch.bfloat16)
    return torch.float32 if half and device.type == "cpu" else stored


def check_device(device: str) -> None:
    """Raise InputError if torch has no such device here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without that backend asserts
        raise InputError(
            f"The device {device!r} cannot be used: {first_line(error)}. Choose another --device, such as cpu."
        ) from error


def memory_available() -> int:
    """Bytes of main memory that this process may still take: what the system has, and what limits leave.

    Where several processes of a run share a machine, each may take an equal part.
    """
    found: int = psutil.virtual_memory().available
    return max(min([found, *_limits()]) // on_this_machine(), 0)


def device_available(device: torch.device) -> int | None:
    """Bytes of the accelerator that this process may still take; None where that cannot be known, as on the CPU."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def disk_available(folder: Path) -> int:
    """Bytes that may still be written to a folder, which need not exist yet."""
    return shutil.disk_usage(existing_parent(folder)).free


def existing_parent(folder: Path) -> Path:
    """Return a path, or the nearest folder above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _limits() -> Iterator[int]:
    """What is left of the limits of the process (``ulimit -v``) and of its control group, where there are any."""
    if sys.platform != "linux":
        return
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        yield limit - psutil.Process().memory_info().vms
    for line in Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield from _left(CGROUPS / path.lstrip("/"), "memory.max", "memory.current")
        elif controllers == "memory":
            group = CGROUPS / "memory" / path.lstrip("/")
            yield from _left(group, "memory.limit_in_bytes", "memory.usage_in_bytes")


def _left(group: Path, limit: str, usage: str) -> Iterator[int]:
    """Of a control group, or of the root that a container sees in its place; cached files give way."""
    for folder in (group, *group.parents):
        if folder in CGROUPS.parents:
            return
        bound, used, more = folder / limit, folder / usage, folder / "memory.stat"
        if not (bound.exists() and used.exists() and more.exists()):
            continue
        text = bound.read_text(encoding="ascii").strip()
        if text != "max":
            stat = dict(line.split() for line in more.read_text(encoding="ascii").splitlines())
            cached = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
            yield int(text) - int(used.read_text(encoding="ascii")) + cached


def peak_memory() -> dict[str, int]:
    """Highest resident memory since ``reset_peak_memory``, and that of the accelerator, in bytes (0: not known)."""
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    if sys.platform == "win32":
        return {"rss": 0, "device": device}
    import resource

    status = Path("/proc/self/status")
    if status.exists():  # Linux: the peak since the last reset
        return {"rss": int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024, "device": device}
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kibibytes elsewhere
    return {"rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "device": device}


def reset_peak_memory() -> None:
    """Forget the peak so far where the system lets a process do so, for a second run in one process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def human_bytes(size: float) -> str:
    """Bytes as text: in GB of 10⁹ bytes or, below one, in MB of 10⁶ bytes."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"  # noqa: PLR2004 - a gigabyte
