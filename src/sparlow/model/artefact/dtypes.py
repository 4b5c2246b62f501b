"""The types a result is stored in, and the bytes it takes."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from sparlow.model.artefact.layers import SparseLowRankLinear
from sparlow.model.forward.compressible import CompressibleWeight

_PARTS = ("weight", "S", "U", "V")  # of a compressed layer


@dataclass(frozen=True)
class StoredDtypes:
    """The types of the result's weights, which are those of the model as it came; it may compute in another.

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
        own = (self.exceptions.get(f"{name}.{part}") for part in ("weight", "S"))
        return next((dtype for dtype in own if dtype), self.dtype)

    def of_tensor(self, name: str) -> torch.dtype:
        """Return the type of a tensor as a file or a model names it."""
        layer, _, part = name.rpartition(".")
        return self.of_layer(layer) if part in _PARTS else self.exceptions.get(name, self.dtype)

    def bytes_of(self, part: nn.Module | CompressibleWeight) -> int:
        """Bytes of the parameters of a module or of a layer as stored, tied ones once."""
        return sum(p.numel() for p in part.parameters()) * self.dtype.itemsize

    def packed_bytes(self, layer: SparseLowRankLinear) -> int:
        """Bytes as stored: kept values, one bit a weight (whole bytes a row) unless all are kept, U, V and the bias."""
        rows, columns = layer.S.shape
        pruned = layer.S.numel() - int((layer.S != 0).sum())
        mask = rows * ((columns + 7) // 8) if pruned else 0
        return self.bytes_of(layer) - pruned * self.dtype.itemsize + mask
