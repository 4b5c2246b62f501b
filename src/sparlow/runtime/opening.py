"""What becomes of compressed layers while a model is opened: packed, merged into one dense weight, or S, U and V.

Imported as soon as transformers is, see ``sparlow.model.artefact.registration``; from then on ``SPARLOW_MODE`` counts.
"""

import logging
import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from torch import Tensor, nn

from sparlow.errors import InputError
from sparlow.model.artefact import opening
from sparlow.model.artefact.layers import compressed_layers, merged
from sparlow.model.artefact.opening import Dense, InFile, Opening
from sparlow.model.forward.fused_layout import put_together
from sparlow.runtime.build import NoKernelError, library
from sparlow.runtime.options import ACTIVATIONS, activations_of
from sparlow.runtime.which import kernel
from sparlow.schema import unknown

if TYPE_CHECKING:  # transformers imports this file while it is on its way in: see registration.py
    from transformers import PreTrainedModel

    from sparlow.runtime.packed import Packed

MODES = ("dense", "packed", "merged", "auto")
MODE = "SPARLOW_MODE"
_log = logging.getLogger("sparlow")


@dataclass
class Opened:
    """Opens a model packed, merged, or as serves best here.

    Attributes:
        mode: ``packed``, ``merged`` or ``auto``.
        activations: See ``PackedLinear``.
        used: Whether a model of sparlow was opened by it.
    """

    mode: str
    activations: str = "float"
    used: bool = field(default=False, init=False)

    def before(self, model: "PreTrainedModel", layers: Collection[InFile], device_map: object) -> Collection[str]:
        """See ``Opening``."""
        self.used = True
        self.mode = self._settled(device_map)
        if self.mode != "packed":
            return ()
        from sparlow.runtime.ends import packable

        taken = packable(model, layers)
        weights: dict[str, Packed] = {}  # by name in the files: what is tied is one
        with _files() as read:
            for layer in taken:
                if layer.stored not in weights:
                    weights[layer.stored] = _packed(model, layer, read(layer))
                _put_packed(model, layer, weights[layer.stored], self.activations)
        _untie(model, {layer.name for layer in taken})
        return [layer.name for layer in taken]

    def after(self, model: "PreTrainedModel") -> bool:
        """See ``Opening``."""
        if self.mode == "packed":
            from sparlow.runtime.packed import PackedModule

            for module in model.modules():
                if isinstance(module, PackedModule):
                    module.unseen = False
            return True
        for name, layer in compressed_layers(model).items():
            _put(model, name, merged(layer))
        put_together(model)
        return False

    def _settled(self, device_map: object) -> str:
        """Return what is done in the end; what was not asked for is said."""
        elsewhere = _elsewhere(device_map)
        if self.mode == "packed" and elsewhere:
            raise InputError(
                f"Packed layers compute on the CPU, not on {elsewhere}. Leave out device_map, or open merged."
            )
        if self.mode == "auto":
            return _told(*_best(elsewhere), self.activations)
        if self.mode == "packed":
            try:
                library()
            except NoKernelError as problem:
                warnings.warn(f"The model is opened merged, not packed. {problem}", stacklevel=2)
                return "merged"
        return self.mode


def _best(elsewhere: str) -> tuple[str, str]:
    """Return the mode that serves best, and why."""
    if elsewhere:
        return "merged", f"packed layers compute on the CPU, not on {elsewhere}"
    found = kernel()
    if not found.path:
        return "merged", found.why.rstrip(".")
    if found.path == "plain":
        return "merged", "the kernel has no instruction set for this processor"
    return "packed", f"the kernel has {found}"


def _told(mode: str, why: str, activations: str) -> str:
    if (mode, activations) == ("packed", "int8"):
        why += "; inputs of layers whose levels are integers are rounded to int8, unless activations is 'float'"
    _log.warning("The model is opened %s: %s.", mode, why)
    return mode


def _elsewhere(device_map: object) -> str:
    places = device_map.values() if isinstance(device_map, Mapping) else [device_map or "cpu"]
    return next((str(place) for place in places if str(place).split(":")[0] not in ("cpu", "auto")), "")


def opening_of(mode: str, activations: str = "float") -> Opening:
    """Return how a model is opened in a mode.

    Raises:
        InputError: There is no such mode.
    """
    if mode not in MODES:
        raise InputError(unknown(f"There is no mode {mode!r}", mode, MODES))
    if activations not in ACTIVATIONS:
        raise InputError(unknown(f"There are no activations {activations!r}", activations, ACTIVATIONS))
    return Dense() if mode == "dense" else Opened(mode, activations)


def by_environment() -> Opening:
    """Return how a model is opened where nobody has said: as the environment says, else for training."""
    taken = os.environ.get(MODE) or "dense"
    return opening_of(taken, activations_of(taken))


def _put(model: "PreTrainedModel", name: str, layer: nn.Module) -> None:
    model.set_submodule(name, layer.train(model.get_submodule(name).training))


@contextmanager
def _files() -> Iterator[Any]:
    """Give a function that returns a layer's tensors, mapped from the files where the system can."""
    with ExitStack() as stack:
        shards: dict[str, Any] = {}

        def read(layer: InFile) -> dict[str, Tensor]:
            found = {}
            for part, header in layer.parts.items():
                file = str(header.file)
                if file not in shards:
                    shards[file] = stack.enter_context(safe_open(file, framework="pt"))
                found[part] = shards[file].get_tensor(f"{layer.stored}.{part}")
            return found

        yield read


def _packed(model: "PreTrainedModel", layer: InFile, parts: dict[str, Tensor]) -> "Packed":
    from sparlow.runtime.packed import Packed

    own, scheme = model.get_submodule(layer.name), layer.record.scheme
    bias = parts.pop("bias", None)
    names = ("num_embeddings", "embedding_dim") if isinstance(own, nn.Embedding) else ("out_features", "in_features")
    out, columns = (int(getattr(own, name)) for name in names)
    return Packed(parts, (out, columns), scheme.grid, scheme.dtype, bias)


def _put_packed(model: "PreTrainedModel", layer: InFile, weight: "Packed", activations: str) -> None:
    from sparlow.runtime.packed import PackedLinear, PackedModule

    own = model.get_submodule(layer.name)
    try:
        if isinstance(own, nn.Embedding):
            from sparlow.runtime.ends import PackedEmbedding, refuse_resizing

            packed: PackedModule = PackedEmbedding(weight, own.weight.dtype, own.padding_idx)
            refuse_resizing(model)
        else:
            packed = PackedLinear(weight, activations)
    except InputError as problem:
        raise InputError(f"{layer.stored}: {problem}") from None
    packed.unseen = True  # else transformers would look for parameters
    _put(model, layer.name, packed)


def _untie(model: "PreTrainedModel", names: Collection[str]) -> None:
    """Take packed layers, which share what is stored, out of the list of parameters that transformers ties."""
    for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
        tied = getattr(model, attribute, None)
        if isinstance(tied, Mapping):
            left = {one: other for one, other in tied.items() if one.removesuffix(".weight") not in names}
            setattr(model, attribute, left)


opening.DEFAULT = by_environment
