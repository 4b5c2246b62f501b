"""The machine a run is on: processor, instruction sets, threads; what is free of memory and disk; peaks, versions.

The bits of a result depend on some of it, because kernels are chosen by instruction set and sums are split between
threads; ``differences`` compares that part. What a system does not tell is None, or left out.
"""

import ctypes
import gc
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from textwrap import shorten
from typing import Any, cast

import psutil
import torch

from sparlow.distributed import local_device, on_this_machine
from sparlow.errors import InputError, first_line
from sparlow.schema import unknown
from sparlow.version import own_version

CPUINFO = Path("/proc/cpuinfo")
SYSCTL = ("/usr/sbin/sysctl", "machdep.cpu", "hw.optional")
PATIENCE = 5  # seconds for sysctl, which takes milliseconds

# What matters to the kernels that compute, and the words for it: in /proc/cpuinfo of Linux and in sysctl of macOS.
INSTRUCTION_SETS: dict[str, tuple[str, ...]] = {
    "AVX2": ("avx2",),
    "AVX-512": ("avx512f",),
    "BF16": ("avx512_bf16", "bf16", "feat_bf16"),
    "VNNI": ("avx512_vnni", "avx512vnni", "avx_vnni"),
    "AMX": ("amx_tile",),
    "NEON": ("asimd", "neon", "advsimd"),
    "DOTPROD": ("asimddp", "feat_dotprod"),
    "SVE": ("sve",),
}

# What torch calls the kernels it has chosen, where a system has no list of its own.
CAPABILITIES: dict[str, tuple[str, ...]] = {
    "AVX2": ("AVX2",),
    "AVX512": ("AVX2", "AVX-512"),
    "SVE256": ("NEON", "SVE"),
}

# Processors of servers that Linux knows by number only.
ARM_PARTS = {"0xd0c": "Neoverse-N1", "0xd40": "Neoverse-V1", "0xd49": "Neoverse-N2", "0xd4f": "Neoverse-V2"}
ARM = "0x41"  # the implementer to which these numbers belong
MOUNTS = Path("/proc/self/mountinfo")  # of Linux
CGROUPS = Path("/sys/fs/cgroup")


def machine() -> dict[str, Any]:
    """Describe this machine, for a report.

    Returns:
        ``system``; ``cpu``, the processor's name; ``instruction_sets`` it has; ``kernels``, the set for which torch
        chose its own; ``cores`` (physical ones, or those the system shows); ``threads`` that torch uses; ``memory`` in
        bytes; ``accelerator``.
    """
    name, found = _processor()
    return {
        "system": platform.platform(),
        "cpu": name,
        "instruction_sets": list(found),
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "memory": _memory(),
        "accelerator": _accelerator(),
    }


def has_bfloat16_arithmetic() -> bool:
    """Whether this processor has instructions for bfloat16; without them torch is slower in it than in float32."""
    return "BF16" in _processor()[1]


def described(record: Mapping[str, Any]) -> str:
    """One line on a machine, of what its record has."""
    sets, memory = record.get("instruction_sets"), record.get("memory")
    parts = [
        str(record.get("cpu") or record.get("system") or "an unknown machine"),
        f"({_said(sets)})" if sets else "",
        *(f"{name}: {record[name]}" for name in ("cores", "threads") if record.get(name)),
        f"{memory / 1e9:.1f} GB of memory" if isinstance(memory, int) else "",
        str(record.get("accelerator") or ""),
    ]
    return ", ".join(filter(None, parts)).replace(", (", " (")


def differences(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Name the differences of two records that may change the bits of a result: "threads (1, then 2)".

    The accelerator counts only where one of the two computed on it, which ``device`` says if it is there.
    """
    names = ["cpu", "instruction_sets", "kernels", "threads", "device"]
    if any(record.get("device") != "cpu" for record in (first, other)):
        names.append("accelerator")
    names += sorted({*first, *other} & {"torch", "transformers"})
    changed = ((name, first.get(name), other.get(name)) for name in names)
    return [f"{name.replace('_', ' ')} ({_said(a)}, then {_said(b)})" for name, a, b in changed if a != b]


def _said(value: object) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, list | tuple) else str(value)


@cache
def _processor() -> tuple[str, tuple[str, ...]]:
    """Return the processor's name and instruction sets, from the source that this system has."""
    name, found = "", tuple[str, ...]()
    with suppress(OSError, ValueError, subprocess.SubprocessError):
        if sys.platform == "linux":
            name, found = from_cpuinfo(CPUINFO.read_text(encoding="utf-8", errors="replace"))
        elif sys.platform == "darwin":
            shown = subprocess.run(SYSCTL, capture_output=True, timeout=PATIENCE, check=False).stdout  # noqa: S603 - fixed
            name, found = from_sysctl(shown.decode("utf-8", errors="replace"))
    capability = torch.backends.cpu.get_cpu_capability()
    return name or platform.processor() or platform.machine(), found or CAPABILITIES.get(capability, ())


def from_cpuinfo(text: str) -> tuple[str, tuple[str, ...]]:
    """Read /proc/cpuinfo: the names of its processors, and the instruction sets that all of them have."""
    entries = [_fields(block) for block in text.split("\n\n")]
    words = [entry.get("flags", entry.get("features", "")).lower().split() for entry in entries]
    listed = [set(found) for found in words if found]
    names = dict.fromkeys(filter(None, map(_name, entries)))
    return " + ".join(names), _instruction_sets(set.intersection(*listed) if listed else ())


def _name(entry: Mapping[str, str]) -> str:
    """The name of a processor: as it stands, or by the numbers that ARM gives."""
    if "model name" in entry:
        return entry["model name"]
    maker, part = entry.get("cpu implementer", ""), entry.get("cpu part", "")
    known = ARM_PARTS.get(part) if maker == ARM else None
    return known or (f"ARM implementer {maker}, part {part}" if maker and part else "")


def from_sysctl(text: str) -> tuple[str, tuple[str, ...]]:
    """Read what sysctl shows of ``machdep.cpu`` and ``hw.optional``, on Intel and Apple processors."""
    shown = _fields(text)
    words = [shown.get(f"machdep.cpu.{name}", "") for name in ("features", "leaf7_features")]
    on = (name for name, there in shown.items() if name.startswith("hw.optional.") and there == "1")
    words += [name.rsplit(".", 1)[-1] for name in on]
    return shown.get("machdep.cpu.brand_string", ""), _instruction_sets(" ".join(words).lower().split())


def _fields(text: str) -> dict[str, str]:
    """Lines of ``name: value``, names in small letters."""
    lines = (line.partition(":") for line in text.splitlines())
    return {name.strip().lower(): value.strip() for name, colon, value in lines if colon}


def _instruction_sets(words: Collection[str]) -> tuple[str, ...]:
    return tuple(name for name, any_of in INSTRUCTION_SETS.items() if any(word in words for word in any_of))


def _cores() -> int | None:
    with suppress(OSError, psutil.Error, RuntimeError, ValueError):
        return psutil.cpu_count(logical=False) or os.cpu_count()
    return os.cpu_count()


def _memory() -> int | None:
    with suppress(OSError, psutil.Error, RuntimeError, ValueError):
        return int(psutil.virtual_memory().total)
    return None


def _accelerator() -> str | None:
    with suppress(RuntimeError, AssertionError):  # a driver that is too old, a device that is taken
        if torch.cuda.is_available():
            return str(torch.cuda.get_device_name())
        if torch.accelerator.is_available():
            kind = torch.accelerator.current_accelerator()
            return None if kind is None else str(kind.type)
    return None


def versions() -> dict[str, str]:
    """Versions of what computed the result."""
    packages = {name: _installed(name) for name in ("torch", "transformers", "safetensors")}
    return {"sparlow": own_version(), **packages, "python": platform.python_version()}


@cache
def _installed(name: str) -> str:
    """Return the version of a package, whose file of metadata is read once: every record of a run asks."""
    return version(name)


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
        raise InputError(_no_device(device, error)) from error


DEVICES = ("auto", "cpu", "cuda", "mps", "xpu")  # that people ask for; torch knows some more


def _no_device(device: str, error: Exception) -> str:
    """Say why a device cannot be used, in fewer words than torch."""
    kind = device.partition(":")[0]
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    there = ["cpu", *([accelerator.type] if accelerator else [])]
    if kind not in DEVICES and "at start of device string" in str(error):
        return unknown(f"There is no device {device!r}", kind, DEVICES)
    if kind not in there:
        return (
            f"The device {device!r} is not there: torch {torch.__version__} finds {' and '.join(there)} here. Choose "
            "one of these with --device, or install a torch that is built for it."
        )
    reason = shorten(first_line(error).rstrip("."), 160, placeholder=" …")
    return f"The device {device!r} cannot be used: {reason}. Choose another --device, such as cpu."


def memory_available() -> int:
    """Return the bytes of main memory that this process may still take, within the limits set for it.

    Where several processes of a run share a machine, each may take an equal part.
    """
    found: int = psutil.virtual_memory().available
    return max(min([found, *_limits()]) // on_this_machine(), 0)


def device_available(device: torch.device) -> int | None:
    """Return the bytes of accelerator memory that are still available; None if unknown, as on the CPU."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def disk_available(folder: Path) -> int:
    """Return the bytes that may still be written to a folder, which need not exist yet."""
    return shutil.disk_usage(existing_parent(folder)).free


def lies_in_memory(folder: Path) -> bool:
    """Whether files of a folder, which need not exist yet, take main memory, as those of a tmpfs do."""
    with suppress(OSError, ValueError):
        device = existing_parent(folder).stat().st_dev
        number = f"{os.major(device)}:{os.minor(device)}"
        for line in MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines():
            fields, _, kind = line.partition(" - ")
            if fields.split()[2] == number and kind.split()[0] in ("tmpfs", "ramfs"):
                return True
    return False


def existing_parent(folder: Path) -> Path:
    """Return a path, or the nearest folder above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _limits() -> Iterator[int]:
    """Yield what is left of the limits of the process (``ulimit -v``) and of its control group, if there are any."""
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


@cache
def _trim() -> Callable[[int], object] | None:
    """What glibc gives back freed memory with; other systems have nothing like it, and need nothing."""
    with suppress(AttributeError, OSError, TypeError):  # TypeError: Windows cannot look into its own process so
        return cast("Callable[[int], object]", ctypes.CDLL(None).malloc_trim)
    return None


def give_back() -> None:
    """Give the system the main memory of what was freed.

    glibc keeps tensors of up to 32 MiB for later ones, of which few have the same size. What one phase freed need not
    lie beside what the next one holds; what is freed within a phase stays (docs/memory.md).
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@contextmanager
def garbage_waits() -> Iterator[None]:
    """Within this context, Python looks for no garbage: each look goes through all objects that there are.

    Where a model of many thousand layers is opened, which makes millions of them, that is a sixth of the time.
    """
    looks = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if looks:
            gc.enable()


def free_memory() -> None:
    """Give back what nothing refers to any more, also what torch keeps of an accelerator for its next tensors."""
    gc.collect()
    give_back()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


def reset_peak_memory() -> None:
    """Reset the peak, if the system allows it, for a second run in one process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
