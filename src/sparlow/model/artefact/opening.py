"""What becomes of compressed layers while a model is opened: S, U and V to train, or something to run.

This folder opens layers in floats. ``sparlow.runtime`` stands above it, and says by ``use`` and ``DEFAULT`` what else
is to happen.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from sparlow.model.artefact.schemes import StoredLayer
from sparlow.model.artefact.shards import Header
from sparlow.model.loading.own import is_own

if TYPE_CHECKING:  # transformers imports this file while it is on its way in: see registration.py
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class InFile:
    """A compressed layer of a model that is opened, or an embedding or a head in codes.

    Attributes:
        name: In the model.
        stored: Its name in the files; of a head that is tied, that of the embedding.
        record: How it is stored.
        parts: Its tensors by the last part of their names, which have been checked.
    """

    name: str
    stored: str
    record: StoredLayer
    parts: Mapping[str, Header]


class Opening(Protocol):
    """What is done with a model's compressed layers before its weights are read, and afterwards."""

    def before(self, model: "PreTrainedModel", layers: Collection[InFile], device_map: object) -> Collection[str]:
        """Replace layers of a model on the meta device; return the names in the model of those that need no loading."""

    def after(self, model: "PreTrainedModel") -> bool:
        """Whether the model, all of whose weights are there, is still one of sparlow's format."""


class Dense:
    """Every layer in floats, as it is trained."""

    def before(self, model: "PreTrainedModel", layers: Collection[InFile], device_map: object) -> Collection[str]:  # noqa: ARG002 - a protocol
        """See ``Opening``."""
        return ()

    def after(self, model: "PreTrainedModel") -> bool:  # noqa: ARG002 - a protocol
        """See ``Opening``."""
        return True


DEFAULT: Callable[[], Opening] = Dense  # replaced by sparlow.runtime: what the environment says
_asked: ContextVar[Callable[[], Opening] | None] = ContextVar("opening", default=None)


def opening() -> Opening:
    """Return what is to be done with the model that is being opened."""
    return Dense() if is_own() else (_asked.get() or DEFAULT)()


@contextmanager
def use(how: Callable[[], Opening]) -> Iterator[None]:
    """Within this context, models are opened in a way."""
    token = _asked.set(how)
    try:
        yield
    finally:
        _asked.reset(token)
