"""How several processes of one run find each other, and see before anything else that all of them mean the same run.

They meet at a store of keys that the first process keeps, or torchrun. Where variables of their environments
contradict each other, some would wait for others that were never started, or leave some behind.
"""

import datetime as dt
import functools
import itertools
import os
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import torch
from torch import distributed as dist

from sparlow.errors import InputError, RunError, first_line, is_out_of_memory

WHERE = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")  # variables that say where the others are
ORIGIN = "Original exception:"  # what gloo puts before the reason that it was given
PAUSE = 0.05  # seconds between looks
SHORTLY = dt.timedelta(seconds=5)  # to tell others that this process will not come
AT_ONCE = 60  # seconds within which all know that the last one has come: each looks all the time
READY = "ready"  # key of how many know that all have come
REFUSED = "refused"  # key of the sentence with which one of them ends all

_times = itertools.count()  # that this process has joined others: keys of an earlier time may still be there


class Keys(Protocol):
    """What is used of torch's stores."""

    def add(self, key: str, value: int, /) -> int:
        """Add to a number, 0 at first; return the sum."""

    def set(self, key: str, value: str, /) -> None:
        """Put something under a key."""

    def get(self, key: str, /) -> bytes:
        """Return what is there."""

    def check(self, keys: list[str], /) -> bool:
        """Whether something is there, under every key."""


@dataclass(frozen=True)
class Own:
    """The keys of one joining in a store, which may be that of an earlier one, too."""

    store: Keys
    prefix: str

    def add(self, key: str, value: int) -> int:
        """Add to a number, 0 at first; return the sum."""
        return self.store.add(self.prefix + key, value)

    def set(self, key: str, value: str) -> None:
        """Put a text under a key."""
        self.store.set(self.prefix + key, value)

    def get(self, key: str) -> str:
        """Return what is there."""
        return self.store.get(self.prefix + key).decode()

    def has(self, key: str) -> bool:
        """Whether something is there."""
        return self.store.check([self.prefix + key])


def opened(timeout: dt.timedelta, *, given: bool) -> "dist.ProcessGroup":
    """Open the process group, unless the caller did; return the one that exchanges what lies on the CPU.

    Args:
        timeout: To wait for processes that do not come.
        given: The caller has opened one.

    Raises:
        InputError: The environment does not say where the others are, or says something else to each.
        RunError: One of them ended before all had met, or does not come.
    """
    try:
        if not given:
            if torch.cuda.is_available():
                torch.cuda.set_device(own_number())  # where memory is counted and NCCL meets
            prefix = _prefix(next(_times))
            store, rank, size = _met(*(os.environ.get(name) for name in WHERE), timeout)
            agree(Own(store, prefix), rank, size, timeout)
            # by default gloo for tensors on the CPU and NCCL for those on CUDA
            stores: Any = dist  # which does not say that it exports them
            own = stores.PrefixStore(prefix, store)
            dist.init_process_group(store=own, rank=rank, world_size=size, timeout=timeout)
        on_cpu: dist.ProcessGroup = dist.new_group(timeout=timeout, backend="gloo")  # the caller's may be NCCL alone
    except InputError:
        raise
    except ValueError as error:
        raise InputError(
            f"WORLD_SIZE says that {started()} processes were started together, but they cannot find each other "
            f"({first_line(error)}). Start them with torchrun, or unset WORLD_SIZE to start one alone."
        ) from error
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise RunError(
            "A process could not meet the others at the start; one has ended or cannot be reached "
            f"({cause(error)}). Look at its message, and repeat the command."
        ) from error
    return on_cpu


def will_not_come(why: str) -> None:
    """Tell those that wait at the start that this process has failed before it joined them, if they can be reached.

    Args:
        why: One sentence.
    """
    if next(_times) or own_rank() == 0:  # it has been there; or it would keep the store, which ends with it
        return
    with suppress(
        KeyError, ValueError, RuntimeError, OSError
    ):  # whatever is the matter, this process ends for another reason
        store, rank, size = _met(*(os.environ.get(name) for name in WHERE), SHORTLY)
        sentence = f"Process {rank} of {size} failed before it had met the others: {why}"
        Own(store, _prefix(0)).set(REFUSED, sentence)


def _prefix(number: int) -> str:
    return f"sparlow {number} "


@functools.cache
def _met(_address: str | None, _port: str | None, _rank: str | None, _size: str | None, timeout: dt.timedelta) -> Any:  # noqa: ANN401 - a store and two numbers
    """Meet the others where the environment says; what is opened for that stays open for the next time.

    The first process would else close it while another one that is quicker has come for the next run already.
    """
    from torch.distributed.rendezvous import rendezvous

    return next(rendezvous("env://", timeout=timeout))


def agree(keys: Own, rank: int, size: int, timeout: dt.timedelta) -> None:
    """Wait until every process is there, and see that each has a number of its own, and counts as many as this one.

    Args:
        keys: Of this joining, in a store that all see.
        rank: Number of this process.
        size: How many it was told there are.
        timeout: To wait for one that does not come.

    Raises:
        InputError: They contradict each other; all that are there say so.
        RuntimeError: One does not come, or has gone again.
    """
    if not 0 <= rank < size:
        _refuse(keys, f"A process was told that it is number {rank} of {size}, counted from 0 (RANK, WORLD_SIZE)")
    if keys.add(f"number {rank}", 1) > 1:
        _refuse(keys, f"Two processes were told that they are number {rank} of {size} (RANK)")
    keys.set(f"size of {rank}", str(size))
    end = time.monotonic() + timeout.total_seconds()
    for other in range(size):
        theirs = int(_told(keys, f"size of {other}", end, f"process {other} of {size} did not come"))
        if theirs != size:
            _refuse(
                keys,
                f"Process {rank} was told that {size} processes were started together, process {other} that {theirs} "
                "were (WORLD_SIZE)",
            )
    keys.add(READY, 1)
    end = time.monotonic() + AT_ONCE
    while keys.add(READY, 0) < size:
        if time.monotonic() > end:
            raise RuntimeError("one that had come has ended while others were waited for")
        time.sleep(PAUSE)


def _told(keys: Own, key: str, end: float, otherwise: str) -> str:
    """Return what stands under a key as soon as it is there."""
    while not keys.has(key):
        if keys.has(REFUSED):
            raise InputError(keys.get(REFUSED))
        if time.monotonic() > end:
            raise RuntimeError(otherwise)
        time.sleep(PAUSE)
    return keys.get(key)


def _refuse(keys: Own, what: str) -> NoReturn:
    """Let all processes end with a sentence."""
    sentence = f"{what}. Start them with torchrun, or see what sets these variables on each machine."
    keys.set(REFUSED, sentence)
    raise InputError(sentence)


def differences(told: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say in which entries what processes were told differs from what the first one was."""
    found: dict[str, str] = {}
    for rank, other in enumerate(told):
        for name in {**told[0], **other}:
            first, own = told[0].get(name), other.get(name)
            if first != own:
                found.setdefault(name, f"{name} ({first} in the first, {own} in process {rank})")
    return [*found.values()]


def cause(error: Exception) -> str:
    """Return what torch.distributed says of a failure in several lines, without places in its sources and advice."""
    said = first_line(error) if ORIGIN not in str(error) else str(error).partition(ORIGIN)[2].strip().splitlines()[0]
    return re.sub(r"^\[\S+:\d+\]\s*", "", said).partition(". This is typically")[0].rstrip(".")


def own_rank() -> int:
    """Return the number of this process among those that were started together; 0 where it is alone."""
    rank = os.environ.get("RANK", "0")
    return int(rank) if rank.isdecimal() else 0


def started() -> int:
    """How many processes torchrun started."""
    size = os.environ.get("WORLD_SIZE", "1")
    if not size.isdecimal():
        raise InputError(f"WORLD_SIZE is {size!r}, which is no number of processes. Unset it, or start torchrun.")
    return int(size)


def own_number() -> int:
    """Return the number of this process's accelerator among those that it sees; if it sees one, the first."""
    own, seen = int(os.environ.get("LOCAL_RANK", "0")), torch.accelerator.device_count()
    return own % seen if seen else own
