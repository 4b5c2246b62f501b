"""Tensors in a file without a name: the system removes it with the process, however that ends."""

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from sparlow.errors import RunError


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies, and what it is."""

    offset: int
    dtype: torch.dtype
    shape: torch.Size


class TensorFile:
    """Takes tensors at its end, and gives them back in any order, on the CPU.

    Args:
        folder: Where the file lies, made if it is not there; the system's folder for temporary files if left out.

    Raises:
        RunError: Nothing can be written there.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder, self._end = folder or Path(tempfile.gettempdir()), 0
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            # where a system cannot make files without a name, it is removed at once, else when it is closed
            self._file: IO[bytes] = tempfile.TemporaryFile(dir=self._folder, prefix="sparlow-", buffering=0)  # noqa: SIM115 - it lives as long as this object
        except OSError as problem:
            raise self._cannot(problem) from problem

    def append(self, tensor: Tensor) -> Entry:
        """Write a tensor; return where it is.

        Raises:
            RunError: It cannot be written.
        """
        entry = Entry(self._end, tensor.dtype, tensor.shape)
        content = _bytes(tensor.detach().cpu().contiguous())
        try:
            self._file.seek(self._end)
            while content:
                content = content[self._file.write(content) :]
        except OSError as problem:
            raise self._cannot(problem) from problem
        self._end = self._file.tell()
        return entry

    def read(self, entry: Entry) -> Tensor:
        """Return a tensor that was written.

        Raises:
            RunError: It cannot be read.
        """
        found = torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
        content: memoryview = _bytes(found)
        source: IO[bytes] = self._file
        try:
            source.seek(entry.offset)
            while content:
                count = source.readinto(content)  # type: ignore[attr-defined]  # an unbuffered file has it
                if not count:
                    raise OSError("the file is shorter than it was")  # noqa: TRY301 - it is one
                content = content[count:]
        except OSError as problem:
            raise RunError(
                f"Cannot read hidden states from {self._folder}: {problem}. Repeat the command."
            ) from problem
        return found

    def _cannot(self, problem: OSError) -> RunError:
        return RunError(
            f"Cannot write hidden states into {self._folder}: {problem}. Free disk space, or use --offload cpu."
        )


def _bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, not copied."""
    if not math.prod(tensor.shape):
        return memoryview(b"")
    return tensor.view(-1).view(torch.uint8).numpy().data
