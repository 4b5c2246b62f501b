"""A model part by part: one decoder block at a time, or everything outside of the blocks.

Whoever needs weights asks for them here, and need not know whether they lie in memory or are read when their turn comes
(``streaming.OnDisk``).
"""

import copy
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from sparlow.finite import all_finite


class Weights(Protocol):
    """Weights on demand, in the type they compute in, on the device they compute on."""

    device: torch.device
    computing: torch.dtype

    def outside_blocks(self, *, stored: bool = False) -> AbstractContextManager[None]:
        """Within this context, everything outside the blocks has its weights.

        Args:
            stored: They will not compute, and may be of the type they are stored in.
        """

    def block(self, i: int, *, load: bool = True) -> AbstractContextManager[nn.Module]:
        """Give block i with its weights. If the model is on disk, changes to the block are lost at the end.

        Args:
            i: Its number.
            load: False where its weights are not needed because they come from elsewhere.
        """


class InMemory:
    """A model that is in memory as a whole and computes in ``computing``. Its blocks are changed in place."""

    def __init__(self, blocks: nn.ModuleList, computing: torch.dtype) -> None:
        self.device, self.computing = next(blocks.parameters()).device, computing
        self._blocks = blocks

    def outside_blocks(self, *, stored: bool = False) -> AbstractContextManager[None]:  # noqa: ARG002 - as they are
        """See ``Weights``."""
        return nullcontext()

    def block(self, i: int, *, load: bool = True) -> AbstractContextManager[nn.Module]:  # noqa: ARG002 - it is there
        """See ``Weights``."""
        return nullcontext(self._blocks[i])


class Untouched(InMemory):
    """The same, of a model that stays as it is: each block is a copy, in its place until it is not needed any more."""

    @contextmanager
    def block(self, i: int, *, load: bool = True) -> Iterator[nn.Module]:  # noqa: ARG002 - it is there
        """See ``Weights``."""
        own = self._blocks[i]
        self._blocks[i] = copy.deepcopy(own)
        try:
            yield self._blocks[i]
        finally:
            self._blocks[i] = own


def to_compute(module: nn.Module, parts: Weights) -> nn.Module:
    """Move weights to the device on which they compute; half precision becomes float32 if that is the type.

    Otherwise each tensor keeps its type: some have one of their own, such as a router's bias in float32.
    """
    return module.to(parts.device, torch.float32 if parts.computing == torch.float32 else None)


@contextmanager
def all_loaded(parts: Weights, count: int) -> Iterator[None]:
    """Within this context, the whole model has its weights."""
    with ExitStack() as stack:
        stack.enter_context(parts.outside_blocks())
        for i in range(count):
            stack.enter_context(parts.block(i))
        yield


def one_by_one(parts: Weights, count: int) -> Iterator[nn.Module]:
    """Yield the blocks, each with its weights until the next is asked for."""
    for i in range(count):
        with parts.block(i) as block:
            yield block


WORTH_A_THREAD = 2**18  # bytes from which on hashing takes longer than handing it to a thread


@dataclass(frozen=True)
class Scan:
    """What one pass over every stored tensor shows.

    Attributes:
        fingerprint: SHA-256 over names, dtypes, shapes and bytes of all of them, tied ones once; the same on every
            device, and after saving and loading.
        damaged: Names of those that hold NaN or infinity.
    """

    fingerprint: str
    damaged: frozenset[str]


def scan(states: Iterable[Mapping[str, Tensor]]) -> Scan:
    """Compute the fingerprint of a model as it is stored, and find damaged tensors.

    Args:
        states: Tensors by name (``state_dict(keep_vars=True)``), all at once or part by part; tied ones in one part.
    """
    lines: dict[str, str] = {}
    damaged: set[str] = set()
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
        for state in states:
            once: dict[int, tuple[str, Tensor]] = {}
            for name, tensor in sorted(state.items()):
                once.setdefault(id(tensor), (name, tensor.detach()))
            tensors = dict(once.values())
            large = {name: pool.submit(_digest, x) for name, x in tensors.items() if x.nbytes >= WORTH_A_THREAD}
            for name, tensor in tensors.items():
                digest = large[name].result() if name in large else _digest(tensor)
                lines[name] = f"{name} {tensor.dtype} {tuple(tensor.shape)} {digest}\n"
                if tensor.is_floating_point() and not all_finite(tensor):
                    damaged.add(name)
    text = "".join(lines[name] for name in sorted(lines))
    return Scan(hashlib.sha256(text.encode()).hexdigest(), frozenset(damaged))


def _digest(tensor: Tensor) -> str:
    data = tensor.cpu().reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().data).hexdigest()
