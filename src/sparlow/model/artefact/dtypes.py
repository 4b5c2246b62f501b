"""The types a result is stored in, and the bytes it takes."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from sparlow.model.artefact.bitmask import mask_bytes
from sparlow.model.artefact.layers import SparseLowRankLinear
from sparlow.model.artefact.stored_form import Weight, pack_weight
from sparlow.model.forward.compressible import CompressibleWeight

_PARTS = ("weight", "S", "U", "V")  # of a compressed layer


@dataclass(frozen=True)
class StoredDtypes:
    """The types of the result's weights: those of the original model, even if it computes in another.

    Attributes:
        dtype: Of nearly all.
        exceptions: The type of each tensor, by its name, that has one of its own, such as a router's bias in float32.
    """

    dtype: torch.dtype
    exceptions: Mapping[str, torch.dtype]

    @classmethod
    def of(cls, model: PreTrainedModel) -> "StoredDtypes":
        """Look at a model before it changes its type for computing."""
        state = model.state_dict().items()
        return cls(model.dtype, {name: tensor.dtype for name, tensor in state if tensor.dtype != model.dtype})

    def of_layer(self, name: str) -> torch.dtype:
        """Return the type of the weight of a layer, dense or compressed; its S, U and V are stored in it."""
        fused = name.rpartition(".")[0]  # of an expert: the parameter that holds those of all
        own = (self.exceptions.get(tensor) for tensor in (f"{name}.weight", f"{name}.S", fused))
        return next((dtype for dtype in own if dtype), self.dtype)

    def of_tensor(self, name: str) -> torch.dtype:
        """Return the type of a tensor as a file or a model names it."""
        layer, _, part = name.rpartition(".")
        return self.of_layer(layer) if part in _PARTS else self.exceptions.get(name, self.dtype)

    def bytes_of(self, module: nn.Module, name: str = "") -> int:
        """Bytes of the parameters of a module of this name in the model as stored, tied ones once."""
        prefix = f"{name}." if name else ""
        return sum(p.numel() * self.of_tensor(prefix + key).itemsize for key, p in module.named_parameters())

    def bytes_of_weight(self, weight: CompressibleWeight, name: str) -> int:
        """Bytes of a layer of this name in the model as stored, its bias included."""
        bias = 0 if weight.bias is None else weight.bias.numel() * self.of_tensor(f"{name}.bias").itemsize
        return weight.shape[0] * weight.shape[1] * self.of_layer(name).itemsize + bias

    def packed_bytes(self, layer: SparseLowRankLinear, name: str) -> int:
        """Bytes as stored: kept values, one bit a weight (whole bytes a row) unless all are kept, U, V and the bias.

        Codes count with their scales and book, if the layer lies on its grid.
        """
        if layer.stored is not None:
            return self._coded_bytes(layer, name)
        rows, columns = layer.S.shape
        pruned = layer.S.numel() - int((layer.S != 0).sum())
        mask = rows * mask_bytes(columns) if pruned else 0
        return self.bytes_of(layer, name) - pruned * self.of_layer(name).itemsize + mask

    def _coded_bytes(self, layer: SparseLowRankLinear, name: str) -> int:
        own = self.of_layer(name)
        packed = pack_weight(Weight(layer.S, layer.U, layer.V), layer.stored, own)
        floats = [] if packed.grid else ["weight"]
        floats += [] if packed.int8_factors else ["U", "V"]
        bias = 0 if layer.bias is None else layer.bias.numel() * self.of_tensor(f"{name}.bias").itemsize
        sizes = (t.numel() * own.itemsize if part in floats else t.nbytes for part, t in packed.tensors.items())
        return sum(sizes) + bias
