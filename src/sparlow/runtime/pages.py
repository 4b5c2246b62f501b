"""Memory in large pages.

A token reads every weight once. In pages of 4 KiB, in which files are mapped, a core waits for the addresses of pages
nearly as long as for their contents; Linux gives pages of 2 MiB to memory that asks for them.
"""

import mmap
from pathlib import Path

import torch
from torch import Tensor

PAGE = 1 << 21  # bytes
_BLOCK = 16 * PAGE  # bytes taken from the system at once: so much more memory is needed while weights move
_ALIGNED = 64  # bytes between the beginnings of two tensors
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def has_large_pages() -> bool:
    """Whether the system gives large pages to memory that asks for them."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return False
    try:
        return "[never]" not in _SETTING.read_text()
    except OSError:
        return False


class LargePages:
    """Holds copies of tensors, one behind the other, in large pages where the system has them."""

    def __init__(self) -> None:
        self._there = has_large_pages()
        self._room = torch.empty(0, dtype=torch.uint8, device="cpu")

    def copy(self, t: Tensor) -> Tensor:
        """Return a copy on the CPU, contiguous and without a gradient."""
        if not t.numel() or not self._there:
            return t.detach().to("cpu", copy=True).contiguous()
        if len(self._room) < t.nbytes:
            self._room = _block(max(t.nbytes, _BLOCK))
        found = self._room[: t.nbytes].view(t.dtype).view(t.shape).copy_(t.detach())
        self._room = self._room[-(-t.nbytes // _ALIGNED) * _ALIGNED :]
        return found


def _block(size: int) -> Tensor:
    """Return so many bytes and a little more, that begin with a large page."""
    memory = mmap.mmap(-1, size + 2 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    found = torch.frombuffer(memory, dtype=torch.uint8)  # which keeps the memory
    return found[-found.data_ptr() % PAGE :]
