"""The types a result is stored in, and the bytes it takes."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from sparlow.model.artefact.bitmask import mask_bytes
from sparlow.model.artefact.layers import SparseLowRankLinear


@dataclass(frozen=True)
class StoredDtypes:
    """The types of the result's weights, which are those of the model as it came; it may compute in another.

    Attributes:
        dtype: Of nearly all.
        exceptions: Names of the tensors that have a type of their own, such as a router's bias in float32.
    """

    dtype: torch.dtype
    exceptions: frozenset[str]

    @classmethod
    def of(cls, model: PreTrainedModel) -> "StoredDtypes":
        """Look at a model before it changes its type for computing."""
        state = model.state_dict().items()
        return cls(model.dtype, frozenset(name for name, tensor in state if tensor.dtype != model.dtype))

    def bytes_of(self, module: nn.Module) -> int:
        """Bytes of a module's parameters as stored, tied ones once."""
        return sum(p.numel() for p in module.parameters()) * self.dtype.itemsize

    def packed_bytes(self, layer: SparseLowRankLinear) -> int:
        """Bytes as stored: kept values, one bit a weight (whole bytes a row), U, V and the bias."""
        rows, columns = layer.S.shape
        pruned = layer.S.numel() - int((layer.S != 0).sum())
        return self.bytes_of(layer) - pruned * self.dtype.itemsize + rows * mask_bytes(columns)
