"""Keys and values of earlier tokens where both transformers and the kernel's step read and write them.

transformers sees a cache that grows. What it holds lies in rooms of float32 that are larger than their contents, so
that a step adds a token by writing it, and nothing is copied.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from sparlow.model._transformers import cache_layer

_LEAST = 256  # tokens of a room


class Room:
    """Numbers (texts, groups, tokens, features) in a room that holds more tokens than there are."""

    def __init__(self) -> None:
        self.all: Tensor | None = None  # (texts, groups, room, features) float32, contiguous
        self.length = 0

    def view(self) -> Tensor | None:
        """Return what is in it."""
        return None if self.all is None else self.all[:, :, : self.length]

    def put(self, new: Tensor) -> None:
        """Add tokens at the end."""
        room = self.reserve(new.shape[-2], new)
        room[:, :, self.length : self.length + new.shape[-2]] = new
        self.length += new.shape[-2]

    def replace(self, new: Tensor | None) -> None:
        """Hold something else, such as fewer tokens or other texts."""
        self.all, self.length = None, 0
        if new is not None:
            self.put(new)

    def reserve(self, more: int, like: Tensor) -> Tensor:
        """Make room for more tokens, of texts, groups and features like these; return the room."""
        if self.all is not None and self.length + more <= self.all.shape[2]:
            return self.all
        size = max(2 * self.length, -(-(self.length + more) // _LEAST) * _LEAST)
        room = torch.zeros(*like.shape[:2], size, like.shape[3], dtype=torch.float32, device="cpu")
        if self.all is not None:
            room[:, :, : self.length] = self.all[:, :, : self.length]
        self.all = room
        return room


class StepLayer(cache_layer()):  # type: ignore[misc]  # transformers' class
    """The keys and values of one block."""

    def __init__(self) -> None:
        self.rooms = Room(), Room()
        self.is_initialized = False
        super().__init__()

    @property
    def keys(self) -> Tensor | None:
        """(texts, groups, tokens, features); None if there are none yet."""
        return self.rooms[0].view()

    @keys.setter
    def keys(self, new: Tensor | None) -> None:
        self.rooms[0].replace(new)

    @property
    def values(self) -> Tensor | None:
        """The same of the values."""
        return self.rooms[1].view()

    @values.setter
    def values(self, new: Tensor | None) -> None:
        self.rooms[1].replace(new)

    def get_seq_length(self) -> int:
        """Return how many tokens there are."""
        return self.rooms[0].length

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401 - transformers'
        """Add tokens; return all keys and values in the type of what is added."""
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        first = not self.get_seq_length()
        for room, states in zip(self.rooms, (key_states, value_states), strict=True):
            room.put(states)
        if first:
            return key_states, value_states
        found = [room.view().to(key_states.dtype) for room in self.rooms]  # type: ignore[union-attr]  # they hold some
        return found[0], found[1]


class StepCache(DynamicCache):
    """The keys and values of all blocks.

    Args:
        blocks: How many there are.
    """

    def __init__(self, blocks: int) -> None:
        super().__init__()
        own = [StepLayer() for _ in range(blocks)]
        self.rooms = [room for layer in own for room in layer.rooms]  # keys, then values, of one block after the other
        self.layers = [*own]

    @property
    def length(self) -> int:
        """How many tokens there are."""
        return self.rooms[0].length

    @property
    def texts(self) -> int:
        """Of how many texts."""
        return 0 if self.rooms[0].all is None else len(self.rooms[0].all)

    def reserve(self) -> tuple[int, list[int]]:
        """Make room for a token; return the size of the rooms, and where each begins.

        Raises:
            RuntimeError: The blocks have not all read the same tokens.
        """
        rooms = [room.reserve(1, room.all) for room in self.rooms if room.all is not None]
        if (
            len(rooms) < len(self.rooms)
            or len({(room.shape, r.length) for room, r in zip(rooms, self.rooms, strict=True)}) > 1
        ):
            raise RuntimeError("the blocks hold keys of different tokens")
        return rooms[0].shape[2], [room.data_ptr() for room in rooms]

    def added(self) -> None:
        """Say that a token has been written behind the others in every block."""
        for room in self.rooms:
            room.length += 1
