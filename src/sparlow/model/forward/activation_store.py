"""Where hidden states are kept between blocks: on the accelerator, in main memory, or in files."""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from sparlow.errors import InputError
from sparlow.machine import device_available, lies_in_memory, memory_available
from sparlow.model.forward.arguments import rebuilt
from sparlow.model.forward.tensor_file import Entry, TensorFile

Shared = Mapping[int, Any]  # what blocks wrote into containers that they share, see ``calls.Call.written``
STORES = ("auto", "cpu", "disk")
AT_ONCE = 4  # copies of the hidden states: inputs of a block, its outputs, targets, and the last of these before


class ActivationStore(Sequence[Tensor]):
    """A sequence of tensors, each with the containers that blocks share (see ``calls``).

    Args:
        place: A device; a folder for a file that goes with the store, or "disk" for one in the system's folder for
            temporary files.
        tensors: What it holds from the beginning.
    """

    def __init__(self, place: torch.device | str | Path, tensors: Iterable[Tensor] = ()) -> None:
        self.place = place
        self._held: list[list[Tensor]] = []
        self._written: list[list[Entry]] = []
        self._shared: list[Any] = []  # containers with the numbers of their tensors
        folder = place if isinstance(place, Path) else None
        self._file = TensorFile(folder) if folder or place == "disk" else None
        for tensor in tensors:
            self.append(tensor)

    def append(self, tensor: Tensor, shared: Shared | None = None) -> None:
        """Put one more at the end.

        Args:
            tensor: What it is.
            shared: What goes along with it: containers of any kind; what was in their tensors is kept.
        """
        tensors, numbers = [tensor.detach()], dict[int, int]()

        def number(part: Tensor) -> _Number:
            if id(part) not in numbers:
                numbers[id(part)] = len(tensors)
                tensors.append(part.detach())
            return _Number(numbers[id(part)])

        self._shared.append(rebuilt(dict(shared), number) if shared else {})
        if self._file:
            self._written.append([self._file.append(t) for t in tensors])
        else:
            self._held.append([t.to(self.place) for t in tensors])  # type: ignore[arg-type]  # no folder

    def shared(self, i: int) -> Shared:
        """Return the shared containers of tensor i, as copies."""
        content = self._shared[i]
        if not content:
            return {}
        tensors = self._tensors(i)
        found: dict[int, Any] = rebuilt(content, lambda number: tensors[number.of], _Number)
        return found

    def fresh(self) -> "ActivationStore":
        """Return an empty one in the same place."""
        return ActivationStore(self.place)

    @property
    def on_disk(self) -> bool:
        """Whether the tensors lie in a file."""
        return self._file is not None

    def __len__(self) -> int:
        return len(self._shared)

    @overload
    def __getitem__(self, i: int) -> Tensor: ...
    @overload
    def __getitem__(self, i: slice) -> list[Tensor]: ...
    def __getitem__(self, i: int | slice) -> Tensor | list[Tensor]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        return self._file.read(self._written[i][0]) if self._file else self._held[i][0]

    def _tensors(self, i: int) -> list[Tensor]:
        return [self._file.read(entry) for entry in self._written[i]] if self._file else self._held[i]


class _Number:
    """In place of a tensor, its number in a list."""

    def __init__(self, of: int) -> None:
        self.of = of


def place(
    offload: str, size: int, device: torch.device, folder: Path | None = None, *, trained: bool = False
) -> torch.device | str:
    """Decide where hidden states wait.

    Args:
        offload: "cpu", "disk", or "auto": the accelerator if they fill less than a quarter of what is free there, else
            main memory if less than half of what this process may still take there, else files, unless those would
            lie in main memory too.
        size: Bytes of one copy.
        device: Where blocks run.
        folder: Where files would lie; the system's folder for temporary ones if left out.
        trained: They wait while blocks are trained. "auto" leaves main memory to the training then, so that more text
            takes no more of it: reading a step's windows from a file takes next to no time beside the step.

    Raises:
        InputError: There is no such place.
    """
    if offload not in STORES:
        raise InputError(f"Block inputs cannot be kept in {offload!r}. Give --offload {', '.join(STORES)}.")
    if offload != "auto":
        return offload
    free = device_available(device)
    if free is not None and 4 * AT_ONCE * size < free:
        return device
    fits = not trained and 2 * AT_ONCE * size < memory_available()
    return "cpu" if fits or lies_in_memory(folder or Path(tempfile.gettempdir())) else "disk"
