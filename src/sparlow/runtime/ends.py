"""The embedding and the output head, packed: the one decodes the rows it is asked for, the other is a packed layer."""

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from sparlow.errors import InputError
from sparlow.model.artefact.layers import SparseLowRankLinear
from sparlow.model.artefact.opening import InFile
from sparlow.model.artefact.stored_form import unpack_weight
from sparlow.runtime.packed import Packed, PackedModule, kernel_reads, layer_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def packable(model: "PreTrainedModel", layers: Collection[InFile]) -> list[InFile]:
    """Return the layers that can stay packed; an embedding and a head that are tied only together.

    Args:
        model: That is being opened, on the meta device.
        layers: Those that its files hold compressed or in codes.
    """
    left = {layer.stored for layer in layers if not _is_packable(model.get_submodule(layer.name), layer)}
    return [layer for layer in layers if layer.stored not in left]


def _is_packable(own: nn.Module, layer: InFile) -> bool:
    """Whether a packed layer computes the same as a module: classes derived from torch's may do more than that."""
    if not kernel_reads({part: header.dtype for part, header in layer.parts.items()}):
        return False
    if type(own) is nn.Embedding:
        return own.max_norm is None
    if type(own) is nn.Linear:  # a head, whose bias must lie beside its weight
        return (own.bias is not None) == ("bias" in layer.parts)
    return isinstance(own, SparseLowRankLinear)


class PackedEmbedding(PackedModule):
    """Rows of an embedding, each decoded when it is asked for, with the numbers that ``mode="dense"`` has.

    The result has the type that the embedding would have: that of the model as it was opened, and what ``half``,
    ``float`` and ``to`` make of it.

    Args:
        packed: The weight (vocabulary, features), its tensors on the CPU.
        dtype: Of the result.
        padding_idx: As of the embedding; it matters to training only.

    Raises:
        InputError: The tensors do not fit each other, or there is no kernel on this machine.
    """

    like: Tensor  # no number; it is cast with the model

    def __init__(self, packed: Packed, dtype: torch.dtype, padding_idx: int | None = None) -> None:
        super().__init__(packed)
        self.num_embeddings, self.embedding_dim = packed.shape
        self.padding_idx = padding_idx
        self.register_buffer("like", torch.empty(0, dtype=dtype, device="cpu"), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Map token ids (…) to their rows (…, features)."""
        if torch.compiler.is_compiling():
            rows: Tensor = torch.ops.sparlow.packed_rows(ids, self._number, self.embedding_dim)
        else:
            rows = self.rows(ids)
        return rows.to(self.packed.dtype).to(self.like.dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """Return the rows of token ids in float32, unrounded.

        Raises:
            InputError: ids are not on the CPU, or not in the vocabulary.
        """
        if ids.device.type != "cpu":
            raise InputError(
                f"Packed layers compute on the CPU, not on {ids.device.type}. Open the model with mode='dense'."
            )
        flat = ids.detach().reshape(-1).long().contiguous()
        if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= self.num_embeddings):
            raise InputError(
                f"A token id is not in the vocabulary: {int(flat.min())} to {int(flat.max())} are given, and ids go up "
                f"to {self.num_embeddings - 1}. Use the model's own tokenizer."
            )
        return self.described().rows(flat).view(*ids.shape, self.embedding_dim)

    def dequantize(self) -> nn.Embedding:
        """Return the same embedding in floats."""
        found = nn.Embedding(*self.packed.shape, self.padding_idx, _weight=self.weight)
        return found.train(self.training)

    @property
    def weight(self) -> Tensor:
        """The whole embedding (vocabulary, features), for code that looks at it; decoded at each access."""
        packed = self.packed
        weight, _ = unpack_weight(packed.parts, packed.shape, packed.grid, packed.dtype)
        return weight.S.to(self.like.dtype)

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows of the embedding."""
        return f"{self.num_embeddings}, {self.embedding_dim}, values={self.values}"


@torch.library.custom_op("sparlow::packed_rows", mutates_args=())
def _rows(ids: Tensor, number: int, columns: int) -> Tensor:  # noqa: ARG001 - for the shape
    found: Tensor = layer_of(number).rows(ids)
    return found


def _shaped(ids: Tensor, number: int, columns: int) -> Tensor:  # noqa: ARG001 - an operator's form
    return ids.new_empty(*ids.shape, columns, dtype=torch.float32)


_rows.register_fake(_shaped)


def refuse_resizing(model: "PreTrainedModel") -> None:
    """Let a model whose embedding is packed say so where its vocabulary is to grow."""
    model.resize_token_embeddings = _refused  # type: ignore[method-assign]  # of this model only


def _refused(*_: Any, **__: Any) -> NoReturn:  # noqa: ANN401 - transformers'
    raise InputError("A packed embedding cannot be resized. Open the model with mode='dense' and resize it there.")
