"""Several processes on one run: ``torchrun --nproc-per-node N -m sparlow compress …``.

All of them do the same steps, each with its share of the calibration windows and of a block's layers. What one finds
the others learn through torch.distributed (gloo on the CPU, NCCL on CUDA). Only the first writes; the model and the
output directory must lie where all can read them.
"""

import datetime as dt
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from sparlow.errors import InputError, RunError, is_out_of_memory

PATIENCE = dt.timedelta(days=2)  # a solve may take hours; a process that died is noticed at once all the same


@dataclass(eq=False)
class Processes:
    """Those that share a run; alone, every method leaves things as they are.

    Attributes:
        rank: Number of this one.
        size: How many there are.
        sent: Bytes that this one gave to collective operations so far.
    """

    rank: int = 0
    size: int = 1
    sent: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def local_rows(self, rows: Tensor) -> Tensor:
        """This process's share of ``rows`` (n, …): consecutive ones, as many as any other's, or one less or more."""
        return rows.tensor_split(self.size)[self.rank]

    def assign(self, costs: Mapping[str, float]) -> dict[str, int]:
        """Give each piece of work to a process, by name: the costliest first, each to who has least to do."""
        load = [0.0] * self.size
        found = {}
        for name in sorted(costs, key=lambda name: -costs[name]):
            found[name] = load.index(min(load))
            load[found[name]] += costs[name]
        return found

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Add up what all processes have, in place; return it."""
        if self.size > 1:
            with self._together(tensor.nbytes):
                dist.all_reduce(tensor)
        return tensor

    def reduce_to(self, tensor: Tensor, wanting: set[int]) -> bool:
        """Add up in place what all have, for those processes that want it; return whether this is one of them."""
        if self.size > 1 and len(wanting) == 1:
            with self._together(tensor.nbytes):
                dist.reduce(tensor, next(iter(wanting)))
        elif wanting:
            self.all_reduce(tensor)
        return self.rank in wanting

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Give all processes what ``source`` has, in place; return it."""
        if self.size > 1:
            with self._together(tensor.nbytes):
                dist.broadcast(tensor, source)
        return tensor

    def totals(self, numbers: Sequence[float]) -> list[float]:
        """Add up each of some numbers over all processes, in float64."""
        return [float(x) for x in self.all_reduce(torch.tensor(numbers, dtype=torch.float64))]

    def all_gather(self, value: Any) -> list[Any]:  # noqa: ANN401 - whatever JSON holds
        """What each process has, in order, as it comes through JSON (torch's own way would unpickle)."""
        if self.size == 1:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [int(n) for n in self.totals([len(data) if rank == self.rank else 0 for rank in range(self.size)])]
        room = torch.zeros(self.size, max(sizes), dtype=torch.uint8)
        room[self.rank, : len(data)] = data
        self.all_reduce(room)
        return [json.loads(bytes(row[:n].tolist())) for row, n in zip(room, sizes, strict=True)]

    def barrier(self) -> None:
        """Go on when all have come here."""
        self.totals([0])

    @contextmanager
    def _together(self, count: int) -> Iterator[None]:
        self.sent += count
        try:
            yield
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise RunError(
                f"Process {self.rank} of {self.size} waited for another one, which ended or cannot be reached: look at "
                f"its message, and repeat the command; it goes on from the last finished block ({error})."
            ) from error


ALONE = Processes()


@contextmanager
def joined() -> Iterator[Processes]:
    """The processes that torchrun started, this one among them; this one alone otherwise.

    A group that the caller of the library has opened already is taken, and stays open.
    """
    given = dist.is_available() and dist.is_initialized()
    if not given and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes()
        return
    if not dist.is_available():
        raise InputError("This torch has no torch.distributed: start one process, without torchrun.")
    if not given:
        if torch.cuda.is_available():
            torch.cuda.set_device(_own_number())  # where memory is counted and NCCL meets
        dist.init_process_group(timeout=PATIENCE)  # by default gloo for tensors on the CPU and NCCL for those on CUDA
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        if not given:
            dist.destroy_process_group()


def require_one(command: str) -> None:
    """Raise InputError if torchrun started several processes for a command that is made for one."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(f"{command} works in one process: start it without torchrun.")


def is_first() -> bool:
    """Whether this process tells the user what goes on: the only one, or the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def on_this_machine() -> int:
    """How many processes of this run share its main memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def local_device(name: str) -> str:
    """An accelerator of this process's own where several share a machine: cuda becomes cuda:1 in the second."""
    if "LOCAL_RANK" not in os.environ or name in ("cpu", "mps") or ":" in name:
        return name
    return f"{name}:{_own_number()}"


def _own_number() -> int:
    """Number of this process's accelerator among those that it sees; where each process sees but one, the first."""
    own, seen = int(os.environ.get("LOCAL_RANK", "0")), torch.accelerator.device_count()
    return own % seen if seen else own
