"""Where hidden states wait for their turn: on the accelerator, in main memory, or as files."""

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import overload

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparlow.errors import InputError
from sparlow.machine import device_available, memory_available

PLACES = ("auto", "cpu", "disk")
AT_ONCE = 4  # copies of the hidden states: inputs of a block, its outputs, targets, and the last of these before


class ActivationStore(Sequence[Tensor]):
    """Tensors in a row, to be read again and again, in any order.

    Args:
        place: a device, or "disk" for files in the system's folder for temporary ones; they go with the store.
        tensors: what it holds from the beginning.
    """

    def __init__(self, place: torch.device | str, tensors: Iterable[Tensor] = ()) -> None:
        self.place = place
        self._held: list[Tensor] = []
        self._count = 0
        self._folder = tempfile.TemporaryDirectory(prefix="sparlow-") if place == "disk" else None
        for tensor in tensors:
            self.append(tensor)

    def append(self, tensor: Tensor) -> None:
        """Put one more at the end."""
        if self._folder:
            save_file({"x": tensor.detach().cpu().contiguous()}, self._file(self._count))
        else:
            self._held.append(tensor.to(self.place))
        self._count += 1

    def fresh(self) -> "ActivationStore":
        """Return an empty one in the same place."""
        return ActivationStore(self.place)

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, i: int) -> Tensor: ...
    @overload
    def __getitem__(self, i: slice) -> list[Tensor]: ...
    def __getitem__(self, i: int | slice) -> Tensor | list[Tensor]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        return load_file(self._file(i % len(self)))["x"] if self._folder else self._held[i]

    def _file(self, i: int) -> Path:
        return Path(self._folder.name if self._folder else "") / f"{i}.safetensors"


def place(offload: str, size: int, device: torch.device) -> torch.device | str:
    """Decide where hidden states wait.

    Args:
        offload: "cpu", "disk", or "auto": the accelerator if they fill less than a quarter of what is free there, else
            main memory if less than half of what this process may still take there, else files.
        size: bytes of one copy.
        device: where blocks run.

    Raises:
        InputError: there is no such place.
    """
    if offload not in PLACES:
        raise InputError(f"There is no place {offload!r} for block inputs. Give --offload {', '.join(PLACES)}.")
    if offload != "auto":
        return offload
    free = device_available(device)
    if free is not None and 4 * AT_ONCE * size < free:
        return device
    return "cpu" if 2 * AT_ONCE * size < memory_available() else "disk"
