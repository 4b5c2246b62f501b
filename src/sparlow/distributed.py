"""Several processes on one run: ``torchrun --nproc-per-node N -m sparlow compress …``.

All of them take the same steps, each with its share of the calibration windows and of the layers of a block. They
exchange results through torch.distributed (gloo on the CPU, NCCL on CUDA). Only the first process writes. The model and
the output directory must be readable by all of them.

Nobody waits for a process that will not come. Before each exchange all meet over gloo, which notices at once when one
has ended; only then does NCCL begin, which would not. How long they wait for one that neither comes nor ends follows
from what they have just done: for as long as it may take where the work was not alike, else for minutes.
"""

import datetime as dt
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from sparlow.errors import InputError, RunError, is_out_of_memory
from sparlow.joining import cause, differences, opened, own_number, started

MINUTES = dt.timedelta(minutes=20)  # to wait for a process that did as much work as this one, beyond SLOWER times that
SLOWER = 4  # times as long as this process may another one take for the same work
PATIENCE = dt.timedelta(days=2)  # where one solves or writes, and others have nothing to do


class LostError(RunError):
    """Another process ended, or does not come: no fault of what this one was doing."""


@dataclass(eq=False)
class Processes:
    """The process group of one run. With a single process every method is a no-op.

    Attributes:
        rank: Number of this one.
        size: How many there are.
        on_cpu: The group that meets before every exchange, and exchanges what lies on the CPU.
        sent: Bytes that this one gave to collective operations so far.
    """

    rank: int = 0
    size: int = 1
    on_cpu: "dist.ProcessGroup | None" = None
    sent: int = 0
    _alike: bool = False  # the work since they met last
    _met: float = 0.0

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

    def part(self) -> None:
        """Say, in every process, that the work up to the next exchange is not alike: one may take hours longer."""
        self._alike = False

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place; return it."""
        if self.size > 1:
            with self._together(tensor.nbytes):
                dist.all_reduce(tensor, group=self._group(tensor))
        return tensor

    def reduce_to(self, tensor: Tensor, wanting: set[int]) -> bool:
        """Sum a tensor in place for the processes that want the sum; return whether this is one of them."""
        if self.size > 1 and len(wanting) == 1:
            with self._together(tensor.nbytes):
                dist.reduce(tensor, next(iter(wanting)), group=self._group(tensor))
        elif wanting:
            self.all_reduce(tensor)
        return self.rank in wanting

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Copy a tensor from process ``source`` to all others, in place; return it."""
        if self.size > 1:
            with self._together(tensor.nbytes):
                dist.broadcast(tensor, source, group=self._group(tensor))
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
        return [json.loads(row[:n].numpy().tobytes()) for row, n in zip(rows, sizes, strict=True)]

    def first_finds(self, find: Callable[[], Any]) -> Any:  # noqa: ANN401 - whatever JSON holds
        """Return what the first process finds, however long that takes; the others only wait for it."""
        found = find() if self.first else None
        self.part()
        if self.size == 1:
            return found
        words = json.dumps(found).encode()
        (size,) = self.totals([len(words) if self.first else 0])
        own = torch.frombuffer(bytearray(words), dtype=torch.uint8)
        data = own if self.first else torch.empty(int(size), dtype=torch.uint8)
        return json.loads(self.broadcast(data).numpy().tobytes())

    def first_does(self, act: Callable[[], object]) -> None:
        """Let the first process do something; if it raises InputError, all do, so that each says what to do."""

        def problem() -> str:
            try:
                act()
            except InputError as error:
                return str(error)
            return ""

        found = self.first_finds(problem)
        if found:
            raise InputError(found)

    def require_alike(self, told: Mapping[str, Any]) -> None:
        """Raise InputError in every process if not all were told the same.

        Args:
            told: What decides what they exchange and compute, by the names that users know; whatever JSON holds.
        """
        found = differences(self.all_gather(told))
        if found:
            raise InputError(
                f"The processes of this run were not started alike: they differ in {', '.join(found)}. Type the same "
                "command on every machine, with the same installation."
            )

    def barrier(self) -> None:
        """Wait until all processes have come here."""
        self.totals([0])

    def _group(self, tensor: Tensor) -> "dist.ProcessGroup | None":
        """The group that exchanges a tensor; None for the one that was opened first."""
        return self.on_cpu if tensor.device.type == "cpu" else None

    @contextmanager
    def _together(self, count: int) -> Iterator[None]:
        self.sent += count
        try:
            self._meet()
            yield
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise LostError(
                f"Process {self.rank} of {self.size} waited for {_lost(error)} ({cause(error)}). Look at its message, "
                "and repeat the command: it resumes from the last finished block."
            ) from error

    def _meet(self) -> None:
        """Wait until all processes are about to exchange something, or one has ended."""
        longest = MINUTES + dt.timedelta(seconds=SLOWER * (time.monotonic() - self._met)) if self._alike else PATIENCE
        dist.monitored_barrier(self.on_cpu, min(longest, PATIENCE))
        self._alike, self._met = True, time.monotonic()


def _lost(error: RuntimeError) -> str:
    """Say which process is missing, as far as that is known, and whether it is still there."""
    named = re.search(r"Rank (\d+) failed to pass", str(error))
    who = f"process {named[1]}" if named else "another one"
    late = "timed out" in str(error).lower()
    return f"{who}, which {'does not come' if late else 'ended or cannot be reached'}"


ALONE = Processes()


@contextmanager
def joined(told: Mapping[str, Any] | None = None) -> Iterator[Processes]:
    """Join the processes that torchrun started, if it did, for the time inside.

    A process group that the caller has opened already is used, and stays open. Of what is opened here nothing is closed
    after an error: that would wait for the others, which may never come. See ``sparlow.cli.leaving``.

    Args:
        told: What this process was told to do, see ``Processes.require_alike``.

    Raises:
        InputError: The others were told something else, or cannot be found.
        RunError: One of them ended, or does not come.
    """
    given = dist.is_available() and dist.is_initialized()
    if not given and started() == 1:
        yield Processes()
        return
    if not dist.is_available():
        raise InputError("This torch has no torch.distributed. Start one process, without torchrun.")
    on_cpu = opened(MINUTES, given=given)
    processes = Processes(dist.get_rank(), dist.get_world_size(), on_cpu, _alike=True, _met=time.monotonic())
    processes.require_alike(told or {})
    yield processes
    dist.destroy_process_group(on_cpu if given else None)


def require_one(command: str) -> None:
    """Raise InputError if torchrun started several processes for a command that is made for one."""
    if started() > 1:
        raise InputError(f"{command} works in one process. Start it without torchrun or accelerate launch.")


def on_this_machine() -> int:
    """How many processes of this run share its main memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def local_device(name: str) -> str:
    """Return the accelerator of this process where several share a machine: cuda becomes cuda:1 in the second.

    Raises:
        InputError: Several would share one.
    """
    if "LOCAL_RANK" not in os.environ or name in ("cpu", "mps"):
        return name
    if ":" in name:
        if on_this_machine() > 1:
            kind = name.partition(":")[0]
            raise InputError(f"All processes of this machine would compute on {name}. Give --device {kind}.")
        return name
    return f"{name}:{own_number()}"


def require_own_device(processes: Processes, device: torch.device) -> None:
    """Raise InputError in every process if several compute on one accelerator, which NCCL would refuse, but late.

    Args:
        processes: All of them call this.
        device: Of this one.
    """
    if processes.size == 1:
        return
    told = processes.all_gather(_identity(device) if "cuda:nccl" in dist.get_backend_config() else "")
    shared = [rank for rank, own in enumerate(told) if own and told.count(own) > 1]
    if shared:
        raise InputError(
            f"Processes {', '.join(map(str, shared))} would compute on accelerators that others of them compute on. "
            "Start one process for each accelerator that a machine shows, see --nproc-per-node and "
            "CUDA_VISIBLE_DEVICES, or give --device cpu."
        )


def _identity(device: torch.device) -> str:
    """Say which accelerator of all machines a device is; nothing of one that need not be told from others."""
    if device.type != "cuda":
        return ""
    return f"{platform.node()} {torch.cuda.get_device_properties(device).uuid}"
