"""The arguments of each block for each micro-batch, kept so that the call can be repeated.

Arguments that are equal for all micro-batches of one size (masks, rotary tables) are kept once. Those that depend on
the text (per-layer embeddings, embedded text beside the hidden state) are kept for each micro-batch, where hidden
states are. Containers that several blocks are given, such as a cache of keys and values, get a number: what one block
writes into them travels with the hidden state to the blocks behind it, see ``Call.written``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparlow.errors import InputError
from sparlow.model.forward.activation_store import ActivationStore, Shared
from sparlow.model.forward.arguments import Way, leaves, rebuilt

Given = tuple[tuple[Any, ...], dict[str, Any]]  # what a block is given beside its hidden state, by position and name
NOTHING: Shared = {}


@dataclass
class Call:
    """The arguments of a block beside its hidden state, for one run.

    Attributes:
        args: Positional arguments behind the hidden state.
        kwargs: Keyword arguments.
        axis: The dimension of the block's own hidden state that counts windows; the next one counts tokens.
        shared: Containers among the arguments that later blocks are given too, by number.
        passing: What earlier blocks wrote for the blocks behind this one.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    axis: int = 0
    shared: Mapping[int, Any] = field(default_factory=dict)
    passing: Shared = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._before = {number: _state(content) for number, content in self.shared.items()}

    def written(self) -> Shared:
        """Return, after the block ran, those containers that blocks share and that one of them wrote into.

        Raises:
            InputError: The block changed a tensor in such a container in place.
        """
        found = dict(self.passing)
        for number, content in self.shared.items():
            before, now = self._before[number], _state(content)
            if not _same_leaves(before, now):
                found[number] = content
            elif any(old.version != new.version for old, new in zip(before, now, strict=True)):
                raise InputError(
                    "A block changes a tensor in place that it shares with other blocks, so it cannot be replayed."
                )
        return found


@dataclass(frozen=True)
class _Leaf:
    """One thing in a container: the way to it, itself, and how often it was changed in place if it is a tensor."""

    way: Way
    value: Any
    version: int


def _state(content: Any) -> list[_Leaf]:  # noqa: ANN401 - any container
    """Return what a container holds now."""
    return [_Leaf(way, value, _version(value)) for way, value in leaves(content)]


def _same_leaves(before: Sequence[_Leaf], now: Sequence[_Leaf]) -> bool:
    """Whether a container holds the same objects as before, even if its tensors were changed in place."""
    if len(before) != len(now):
        return False
    return all(old.way == new.way and old.value is new.value for old, new in zip(before, now, strict=True))


def _version(value: object) -> int:
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0  # noqa: SLF001 - torch's count


@dataclass(frozen=True)
class _Constant:
    """Stands for a tensor that is equal for all micro-batches of one size."""

    value: Tensor


@dataclass(frozen=True)
class _OfText:
    """Stands for a tensor of a single micro-batch, by its number in a store."""

    number: int


_KEPT = (_Constant, _OfText)


@dataclass(frozen=True)
class _Note:
    """The arguments of one call, with a stand-in for every tensor.

    Attributes:
        arguments: Positional ones and those by name.
        containers: The containers among them, by number.
        altered: Numbers of the containers that the model itself changed after an earlier block was given them.
        later: Numbers of the containers that later blocks are given too; filled in after all blocks have been called.
    """

    arguments: Given
    containers: Mapping[int, Any]
    altered: frozenset[int]
    later: set[int] = field(default_factory=set)

    def leaves(self) -> list[tuple[Way, Any]]:
        return list(leaves(self.arguments, _KEPT))

    def equals(self, other: "_Note") -> bool:
        """Whether both are the same call; tensors are equal if the same stand-in object is in their place."""
        mine, others = self.leaves(), other.leaves()
        if self.containers.keys() != other.containers.keys() or len(mine) != len(others):
            return False
        pairs = zip(mine, others, strict=True)
        return self.altered == other.altered and all(way == at and _equal(x, y) for (way, x), (at, y) in pairs)


def _equal(one: object, other: object) -> bool:
    return one is other or (type(one) is type(other) and isinstance(one, str | int | float) and one == other)


class BlockCalls:
    """The calls of one block, by number of the micro-batch.

    Args:
        of_text: Holds the tensors of single micro-batches.
    """

    def __init__(self, of_text: ActivationStore) -> None:
        self.axis = 0
        self.notes: list[_Note] = []
        self._of_text = of_text

    def __len__(self) -> int:
        return len(self.notes)

    def at(self, i: int, device: torch.device | str, shared: Shared = NOTHING) -> Call:
        """Return the arguments for micro-batch i with their tensors on ``device``. Use them for one run only.

        Args:
            i: Number of the micro-batch.
            device: Where the block is.
            shared: What the blocks before it wrote into containers, see ``Call.written``.

        Raises:
            InputError: Blocks and the model around them write to the same container.
        """
        note = self.notes[i]
        came: dict[int, Any] = rebuilt(dict(shared), lambda tensor: tensor.to(device))
        if note.altered & came.keys():
            raise InputError("Blocks and the model around them change the same argument, so they cannot be replayed.")
        made = {id(content): came[number] for number, content in note.containers.items() if number in came}
        args, kwargs = rebuilt(note.arguments, lambda kept: self._tensor(kept).to(device), _KEPT, made)
        own = {number: made[id(content)] for number, content in note.containers.items() if number in note.later}
        return Call(args, kwargs, self.axis, own, {n: content for n, content in came.items() if n in note.later})

    def _tensor(self, kept: _Constant | _OfText) -> Tensor:
        return kept.value if isinstance(kept, _Constant) else self._of_text[kept.number]


class CallRecorder:
    """Records the arguments of the blocks of a model, one micro-batch after the other.

    Args:
        depth: How many blocks there are.
        of_text: Takes the tensors of single micro-batches.
    """

    def __init__(self, depth: int, of_text: ActivationStore) -> None:
        self.calls = [BlockCalls(of_text) for _ in range(depth)]
        self._of_text = of_text
        self._first: list[dict[int, _Note]] = [{} for _ in range(depth)]  # of each size
        self.begin(0)

    def begin(self, size: int) -> None:
        """Begin a micro-batch of ``size`` windows."""
        self._size = size
        self._current: list[_Note] = []
        self._held: list[Any] = []  # all arguments, so that ids stay what they are
        self._kept: dict[int, _Constant | _OfText] = {}  # by id of the tensor
        self._numbers: dict[int, int] = {}  # of containers, by id
        self._last: dict[int, list[tuple[Way, Any]]] = {}  # what they held when a block was last given them

    def note(self, given: Given, axis: int) -> None:
        """Record the call of the next block."""
        i = len(self._current)
        self.calls[i].axis = axis
        self._held.append(given)
        first = self._first[i].get(self._size)
        alike = dict(first.leaves()) if first else {}
        ways = iter([way for way, leaf in leaves(given) if isinstance(leaf, Tensor)])
        made: dict[int, Any] = {}
        arguments = rebuilt(given, lambda t: self._keep(t, alike.get(next(ways)), first is None), made=made)
        del made[id(given[1])]  # which was made for this call alone
        containers, altered = {}, set()
        for key, content in made.items():
            number = self._numbers.setdefault(key, len(self._numbers))
            containers[number] = content
            held = list(leaves(content, _KEPT))
            if number in self._last and held != self._last[number]:
                altered.add(number)
            self._last[number] = held
        self._current.append(_Note(arguments, containers, frozenset(altered)))

    def end(self) -> None:
        """End a micro-batch, after all blocks have been called."""
        later: set[int] = set()
        for i, note in reversed(list(enumerate(self._current))):
            note.later.update(later)
            later |= note.containers.keys()
            first = self._first[i].setdefault(self._size, note)
            self.calls[i].notes.append(first if note.equals(first) else note)
        self.begin(0)

    def _keep(self, tensor: Tensor, alike: object, first: bool) -> _Constant | _OfText:
        """Return the stand-in of a tensor: a constant if the first micro-batch of this size had an equal one here."""
        if id(tensor) not in self._kept:
            if first:
                self._kept[id(tensor)] = _Constant(tensor)
            elif isinstance(alike, _Constant) and _same(alike.value, tensor):
                self._kept[id(tensor)] = alike
            else:
                self._of_text.append(tensor)
                self._kept[id(tensor)] = _OfText(len(self._of_text) - 1)
        return self._kept[id(tensor)]


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
