"""Weights in large pages of memory.

A token reads every weight once. In pages of 4 KiB, in which files are mapped, a core waits for the addresses of pages
nearly as long as for their contents; Linux gives pages of 2 MiB to memory that asks for them.
"""

import mmap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from sparlow.runtime.packed import PackedModule

PAGE = 1 << 21  # bytes
_BLOCK = 16 * PAGE  # bytes taken from the system at once: so much more memory is needed while weights move
_ALIGNED = 64  # bytes between the beginnings of two weights
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def has_large_pages() -> bool:
    """Whether the system gives large pages to memory that asks for them."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return False
    try:
        return "[never]" not in _SETTING.read_text()
    except OSError:
        return False


def use_large_pages(model: nn.Module) -> None:
    """Move a model's weights, packed and dense, to large pages where the system has them.

    No number changes, and what is shared stays shared. Packed weights are then no longer mapped from their file. A
    model that fills no such page, and weights on accelerators or in memory shared with other processes, stay.
    """
    if not has_large_pages() or _bytes(model) < PAGE:
        return
    moved = _mover()
    for modules in _by_weight(model):
        packed = modules[0].packed
        bias = None if packed.bias is None else moved(packed.bias)
        new = replace(packed, parts={part: moved(tensor) for part, tensor in packed.parts.items()}, bias=bias)
        for module in modules:
            module.take(new)
    for parameter in _dense(model):
        parameter.data = moved(parameter.data)


def _by_weight(model: nn.Module) -> list[list[PackedModule]]:
    """Return the packed layers, those that are tied side by side."""
    found: dict[int, list[PackedModule]] = {}
    for module in model.modules():
        if isinstance(module, PackedModule):
            found.setdefault(id(module.packed), []).append(module)
    return list(found.values())


def _dense(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if type(p) is nn.Parameter and _movable(p)]


def _bytes(model: nn.Module) -> int:
    return sum(p.nbytes for p in _dense(model)) + sum(modules[0].bytes for modules in _by_weight(model))


def _movable(t: Tensor) -> bool:
    return t.is_cpu and t.layout == torch.strided and t.is_contiguous() and not t.is_shared()


def _mover() -> Callable[[Tensor], Tensor]:
    """Return a function that copies a tensor behind those that it was given before; the same one to the same place."""
    room = torch.empty(0, dtype=torch.uint8, device="cpu")
    known: dict[tuple[int, torch.Size, torch.dtype], Tensor] = {}

    def moved(t: Tensor) -> Tensor:
        nonlocal room
        if not t.numel() or not _movable(t):
            return t
        key = (t.data_ptr(), t.shape, t.dtype)
        if key not in known:
            if len(room) < t.nbytes:
                room = _block(max(t.nbytes, _BLOCK))
            known[key] = room[: t.nbytes].view(t.dtype).view(t.shape).copy_(t)
            room = room[-(-t.nbytes // _ALIGNED) * _ALIGNED :]
        return known[key]

    return moved


def _block(size: int) -> Tensor:
    """Return so many bytes and a little more, that begin with a large page."""
    memory = mmap.mmap(-1, size + 2 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    found = torch.frombuffer(memory, dtype=torch.uint8)  # which keeps the memory
    return found[-found.data_ptr() % PAGE :]
