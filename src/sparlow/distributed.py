"""Several processes on one run: ``torchrun --nproc-per-node N -m sparlow compress …``.

All of them take the same steps, each with its share of the calibration windows and of the layers of a block. They
exchange results through torch.distributed (gloo on the CPU, NCCL on CUDA). Only the first process writes. The model and
the output directory must be readable by all of them.
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
    """The process group of one run. With a single process every method is a no-op.

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
        """Return this process's share of ``rows`` (n, …): consecutive rows, divided as evenly as possible."""
        return rows.tensor_split(self.size)[self.rank]

    def assign(self, costs: Mapping[str, float]) -> dict[str, int]:
        """Assign each piece of work, by name, to a process: the costliest first, each to the least loaded process."""
        load = [0.0] * self.size
        found = {}
        for name in sorted(costs, key=lambda name: -costs[name]):
            found[name] = load.index(min(load))
            load[found[name]] += costs[name]
        return found

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place; return it."""
        if self.size > 1:
            with self._together(tensor.nbytes):
                dist.all_reduce(tensor)
        return tensor

    def reduce_to(self, tensor: Tensor, wanting: set[int]) -> bool:
        """Sum a tensor in place for the processes that want the sum; return whether this is one of them."""
        if self.size > 1 and len(wanting) == 1:
            with self._together(tensor.nbytes):
                dist.reduce(tensor, next(iter(wanting)))
        elif wanting:
            self.all_reduce(tensor)
        return self.rank in wanting

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Copy a tensor from process ``source`` to all others, in place; return it."""
        if self.size > 1:
            with self._together(tensor.nbytes):
                dist.broadcast(tensor, source)
        return tensor

    def totals(self, numbers: Sequence[float]) -> list[float]:
        """Sum each number over all processes, in float64."""
        return [float(x) for x in self.all_reduce(torch.tensor(numbers, dtype=torch.float64))]

    def all_gather(self, value: Any) -> list[Any]:  # noqa: ANN401 - whatever JSON holds
        """Return the value of every process, in order. It is sent as JSON, because torch's own way unpickles."""
        if self.size == 1:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [int(n) for n in self.totals([len(data) if rank == self.rank else 0 for rank in range(self.size)])]
        rows = torch.zeros(self.size, max(sizes), dtype=torch.uint8)
        rows[self.rank, : len(data)] = data
        self.all_reduce(rows)
        return [json.loads(bytes(row[:n].tolist())) for row, n in zip(rows, sizes, strict=True)]

    def barrier(self) -> None:
        """Wait until all processes have come here."""
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
                f"Process {self.rank} of {self.size} waited for another one, which ended or cannot be reached "
                f"({error}). Look at its message, and repeat the command: it resumes from the last finished block."
            ) from error


ALONE = Processes()


@contextmanager
def joined() -> Iterator[Processes]:
    """Join the processes that torchrun started, if it did, for the time inside.

    A process group that the caller has opened already is used, and stays open.
    """
    given = dist.is_available() and dist.is_initialized()
    if not given and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes()
        return
    if not dist.is_available():
        raise InputError("This torch has no torch.distributed. Start one process, without torchrun.")
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
        raise InputError(f"{command} works in one process. Start it without torchrun.")


def is_first() -> bool:
    """Whether this process tells the user what goes on: the only one, or the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def on_this_machine() -> int:
    """How many processes of this run share its main memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def local_device(name: str) -> str:
    """Return the accelerator of this process where several share a machine: cuda becomes cuda:1 in the second."""
    if "LOCAL_RANK" not in os.environ or name in ("cpu", "mps") or ":" in name:
        return name
    return f"{name}:{_own_number()}"


def _own_number() -> int:
    """Return the number of this process's accelerator among those that it sees; if it sees one, the first."""
    own, seen = int(os.environ.get("LOCAL_RANK", "0")), torch.accelerator.device_count()
    return own % seen if seen else own
