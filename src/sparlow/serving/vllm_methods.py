"""How vLLM's layers load and compute compressed weights: by our kernel on the CPU, as dense ones anywhere else.

vLLM joins weights that read one input (q, k and v; gate and up) into one layer, renames their tensors and says with
each of them which part it is. Here the parts stay apart: each has its own values, U and V, and the kernel multiplies
all of them in one call.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.model_executor.layers.linear import LinearMethodBase

from sparlow.errors import InputError
from sparlow.model.artefact.schemes import StoredLayer, packed_types
from sparlow.runtime.build import NoKernelError
from sparlow.runtime.options import activations_of
from sparlow.runtime.pages import LargePages
from sparlow.serving.weights import Packed, Stored, expanded

_log = logging.getLogger("vllm.sparlow")  # shown as vLLM shows its own
INSTEAD = "Or serve what sparlow export DIR --out OUT --as merged writes."
_PARTS = {"q": 0, "k": 1, "v": 2}  # what vLLM calls the parts of attention; others have numbers
_said: set[str] = set()
_pages = LargePages()


def say(sentence: str, level: int = logging.WARNING) -> None:
    """Log a sentence once in a process."""
    if sentence not in _said:
        _said.add(sentence)
        _log.log(level, "%s", sentence)


class SparlowLinearMethod(LinearMethodBase):  # type: ignore[misc]  # vLLM's class, which is not here when types are checked
    """Loads and computes one of vLLM's linear layers.

    Args:
        parts: The ways in which each of the stored weights that the layer joins may be stored, by name.
    """

    def __init__(self, parts: Mapping[str, Sequence[StoredLayer]]) -> None:
        self.parts = dict(parts)
        self.stored: dict[str, Stored] = {}
        self.packed: Packed | None = None

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,  # noqa: ANN401 - vLLM's
    ) -> None:
        """Give the layer a parameter without numbers for each tensor that the files hold.

        Raises:
            InputError: The layer is to be divided among several processes.
        """
        if input_size_per_partition != input_size or sum(output_partition_sizes) != output_size:
            raise InputError(
                "A model that sparlow compressed cannot be divided by tensor parallelism. Give "
                f"--tensor-parallel-size 1. {INSTEAD}"
            )
        sizes = self._sizes(layer, output_partition_sizes)
        self.stored = {
            name: Stored(name, records, (rows, input_size))
            for (name, records), rows in zip(self.parts.items(), sizes, strict=True)
        }
        self.dtype = params_dtype
        for part, dtype in self._expected(params_dtype).items():
            parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            parameter.weight_loader = self._loader(part)  # type: ignore[attr-defined]  # where vLLM looks for it
            layer.register_parameter(part, parameter)

    def _sizes(self, layer: nn.Module, sizes: Sequence[int]) -> Sequence[int]:  # noqa: ARG002 - for embeddings
        """Return the rows of each stored weight."""
        if len(self.parts) == 1:  # it may have been stored joined
            return [sum(sizes)]
        if len(sizes) != len(self.parts):
            names = ", ".join(self.parts)
            raise InputError(f"vLLM makes {len(sizes)} weights of {names}, which cannot be served packed. {INSTEAD}")
        return sizes

    def _expected(self, own: torch.dtype) -> dict[str, torch.dtype]:
        """Return the tensors that may come by the last part of their names, and the type of each."""
        found = {"weight": own}
        for record in (record for records in self.parts.values() for record in records):
            for part, types in packed_types(record.scheme).items():
                found[part] = record.scheme.dtype if record.scheme.dtype in types else types[0]
        return found

    def _loader(self, part: str) -> Any:  # noqa: ANN401 - a function of vLLM's form
        """Return what vLLM calls with a tensor from the files, and with the part of the layer if it joins several."""
        stored = list(self.stored.values())

        def load(_: nn.Parameter, loaded: Tensor, shard_id: str | int | None = None) -> None:
            which = getattr(loaded, "shard_id", None) if shard_id is None else shard_id
            number = 0 if which is None else _PARTS.get(which, which) if isinstance(which, str) else which
            if not isinstance(number, int) or not 0 <= number < len(stored) or (which is None and len(stored) > 1):
                names = ", ".join(weight.name for weight in stored)
                raise InputError(f"vLLM gave the {part} of {names} as the part {which!r}, which is not known here.")
            stored[number].tensors[part] = _pages.copy(loaded)

        return load

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Describe what has come to the kernel, or expand it.

        Raises:
            InputError: Tensors are missing or damaged.
        """
        placeholder: Tensor = layer.weight  # type: ignore[assignment]  # a parameter
        device, weights = placeholder.device, list(self.stored.values())
        for part in [name for name, _ in layer.named_parameters(recurse=False) if name != "bias"]:
            delattr(layer, part)
        if why := _why_not_packed(weights, device):
            say(f"Layers that sparlow compressed are expanded to dense ones: {why}.")
        else:
            try:
                self.packed = Packed(weights, activations_of("packed"))
            except NoKernelError as problem:
                say(f"Layers that sparlow compressed are expanded to dense ones. {problem}")
        weight = torch.empty(0) if self.packed else expanded(self.stored, self.dtype, device)
        layer.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
        self.stored = {}
        if self.packed is not None:
            path = _path(self.packed)
            say(f"Layers that sparlow compressed stay packed, and are computed by its kernel ({path}).", logging.INFO)
            if self.packed.rounded:
                say("Inputs of those whose levels are integers are rounded to int8, as the environment says.")

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x Wᵀ + b (…, out)."""
        if self.packed is None:
            weight: Tensor = layer.weight  # type: ignore[assignment]  # a parameter
            return functional.linear(x, weight, bias)
        y = self.packed.product(x)
        return y if bias is None else y + bias


class SparlowEmbeddingMethod(SparlowLinearMethod):
    """Loads and computes an embedding or an output head, whose rows vLLM fills up to a multiple of 64."""

    tied: nn.Module | None = None  # the embedding that a head shares its weight with

    def _sizes(self, layer: nn.Module, sizes: Sequence[int]) -> Sequence[int]:
        self.filled_up = sum(sizes)
        return [int(layer.org_vocab_size)]  # type: ignore[arg-type]  # vLLM's number

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        """Let a head compute with the weight of an embedding.

        Raises:
            InputError: The two are stored in different ways.
        """
        if not isinstance(getattr(embed_tokens, "quant_method", None), SparlowEmbeddingMethod):
            raise InputError(
                f"The output head is compressed and shares its weight with an embedding that is not. {INSTEAD}"
            )
        self.tied = embed_tokens
        for part in [name for name, _ in layer.named_parameters(recurse=False) if name != "bias"]:
            delattr(layer, part)
        layer.register_parameter("weight", embed_tokens.weight)  # type: ignore[arg-type]  # a parameter
        return layer

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """As of a linear layer; what is tied has nothing of its own."""
        if self.tied is None:
            super().process_weights_after_loading(layer)

    def embedding(self, layer: nn.Module, ids: Tensor) -> Tensor:
        """Return the rows of token ids."""
        if self.packed is not None:
            return self.packed.rows(ids, self.dtype)
        weight: Tensor = layer.weight  # type: ignore[assignment]  # a parameter
        return functional.embedding(ids, weight)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the logits (…, rows of vLLM); beyond the vocabulary they are 0, as of rows of zeros."""
        own = self.tied or layer
        method: SparlowEmbeddingMethod = own.quant_method  # type: ignore[assignment]  # vLLM keeps it there
        y = SparlowLinearMethod.apply(method, own, x)
        if y.shape[-1] < self.filled_up:
            y = functional.pad(y, (0, self.filled_up - y.shape[-1]))
        return y if bias is None else y + bias


def _why_not_packed(weights: Sequence[Stored], device: torch.device) -> str:
    """Return why weights cannot stay packed; empty if they can."""
    if device.type != "cpu":
        return f"the kernel computes on the CPU, not on {device.type}"
    return "the kernel does not read numbers of 64 bits" if any(weight.wide for weight in weights) else ""


def _path(packed: Packed) -> str:
    from sparlow.runtime.build import PATHS
    from sparlow.runtime.product import path_number

    return PATHS[path_number(packed.joined.operands[0].lib)]
