"""The compressed layer: a sparse weight plus a low-rank one in place of a dense one."""

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional

from sparlow.errors import InputError
from sparlow.model.artefact.stored_form import StoredForm, is_flat, take_packed
from sparlow.model.forward.compressible import CompressibleWeight, compressible, expert_of, weight_of

if TYPE_CHECKING:  # transformers imports this file while it is on its way in: see registration.py
    from transformers import PreTrainedModel

FULL = 32  # bits of a number in which S + U V is as good as its parts


class _OnSupport(torch.autograd.Function):
    """The identity, whose gradient is zero wherever its input is zero.

    A function and not a hook on the parameter, because hooks are lost by ``copy.deepcopy``; masked_fill and not a
    product, because 0 · inf is NaN.
    """

    @staticmethod
    def forward(S: Tensor) -> Tensor:
        return S.view_as(S)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor], output: Tensor) -> None:  # noqa: ARG004 - torch's form
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ANN401 - torch types saved_tensors nowhere
        (S,) = ctx.saved_tensors
        return grad.masked_fill(S == 0, 0)


class StillPacked(nn.Module):
    """A layer that is held as it is stored, and can be had in floats."""

    def dequantize(self) -> nn.Module:
        """Return the same layer in floats: with S, U and V if it is a compressed one."""
        raise NotImplementedError


class SparseLowRankLinear(nn.Module):
    """y = x Sᵀ + (x Vᵀ) Uᵀ + b, where entries of S that are zero stay zero in training.

    They get no gradient, so plain and decoupled weight decay, momentum and Adam's moments leave them at +0.0 too.
    The layer owns copies of the tensors it is given. ``stored`` says how it is to be packed in a file, as long as its
    numbers lie on that grid; None for floats.

    Args:
        S: (out, in); -0.0 becomes +0.0.
        U: (out, rank); the rank may be 0.
        V: (rank, in).
        bias: (out,) or None.

    Raises:
        InputError: The shapes do not fit together.
    """

    def __init__(self, S: Tensor, U: Tensor, V: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.stored: StoredForm | None = None
        out, features, rank = len(S), S.shape[-1], len(V)
        if S.ndim != 2 or U.shape != (out, rank) or V.shape != (rank, features):  # noqa: PLR2004 - a matrix
            raise InputError(f"S {tuple(S.shape)}, U {tuple(U.shape)} and V {tuple(V.shape)} do not fit S + U V.")
        if bias is not None and bias.shape != (out,):
            raise InputError(f"The bias must have the shape ({out},), not {tuple(bias.shape)}.")
        self.in_features, self.out_features, self.rank = features, out, rank
        S = S.detach() if S.is_meta else (S.detach() + 0.0).contiguous()  # -0.0 + 0.0 = +0.0
        self.S = nn.Parameter(S)
        self.U, self.V = (
            nn.Parameter(part.detach() if part.is_meta else part.detach().clone(memory_format=torch.contiguous_format))
            for part in (U, V)
        )
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, in) to (…, out).

        For many tokens it is quicker to form S + U V than to take three products. That is done where nothing is
        trained or traced, and where the sum is not rounded to half precision.
        """
        if self.rank and self._may_be_formed(x):
            out, features = self.S.shape
            if x.numel() * (out + features) > features * out * features:
                return functional.linear(x, self.weight, self.bias)
        y = functional.linear(x, self._trainable_S(), self.bias)
        return y + functional.linear(functional.linear(x, self.V), self.U) if self.rank else y

    def _may_be_formed(self, x: Tensor) -> bool:
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
            return False
        return torch.finfo(self.S.dtype).bits >= FULL

    def _trainable_S(self) -> Tensor:  # noqa: N802 - S is the papers' letter
        if not (torch.is_grad_enabled() and self.S.requires_grad):
            return self.S
        return _OnSupport.apply(self.S)  # type: ignore[no-untyped-call, no-any-return]  # untyped in torch

    @property
    def weight(self) -> Tensor:
        """S + U V (out, in), for code that looks at a linear layer's weight; computed at each access.

        Gradients flow as they do in ``forward``. It is no parameter: what is written into it is lost.
        """
        S = self._trainable_S()
        return torch.addmm(S, self.U, self.V) if self.rank else S

    def sparse_weight(self) -> Tensor:
        """Return S (out, in), without gradient; it shares the layer's memory."""
        return self.S.detach()

    def low_rank_weight(self) -> Tensor:
        """Return U V (out, in), without gradient."""
        return self.U.detach() @ self.V.detach()

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows of the layer."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
        return f"{sizes}, bias={self.bias is not None}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:  # noqa: ANN401 - torch
        """Take S, U and V from their packed form too, which is what Trainer finds when it resumes from a checkpoint."""
        if is_flat(state_dict.get(f"{prefix}weight")):
            grid, dtype = (self.stored.grid, self.stored.dtype) if self.stored else (None, None)
            shape = (self.out_features, self.in_features)
            weight, self.stored = take_packed(state_dict, prefix, shape, grid, dtype or self.S.dtype)
            state_dict |= {f"{prefix}{part}": tensor for part, tensor in weight._asdict().items()}
        super()._load_from_state_dict(state_dict, prefix, *args)


def compressed_layers(root: nn.Module) -> dict[str, SparseLowRankLinear]:
    """Return the compressed layers by name, in module order."""
    return {name: m for name, m in root.named_modules() if isinstance(m, SparseLowRankLinear)}


def merged(layer: SparseLowRankLinear) -> nn.Linear:
    """Return a linear layer of the weight S + U V, which is rounded once."""
    with torch.no_grad():
        W = (layer.S.float() + layer.U.float() @ layer.V.float()).to(layer.S.dtype) if layer.rank else layer.S
    found = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    found.weight = nn.Parameter(W.detach())
    found.register_parameter("bias", layer.bias)
    return found.train(layer.training)


def install(root: nn.Module, name: str, rank: int) -> SparseLowRankLinear:
    """Replace what can be compressed under ``name`` in ``root`` by a compressed layer on the meta device.

    Raises:
        InputError: There is nothing of this name that can be compressed.
    """
    try:
        weight = weight_of(root, name, root.get_submodule(name))
    except AttributeError:  # as torch says that there is no such module
        weight = expert_of(root, name)
    if weight is None:
        raise InputError(f"{name} is compressed, but the model has no linear layer of this name.")
    out, features = weight.shape
    S, U, V = (
        torch.empty(shape, dtype=weight.dtype, device="meta")
        for shape in ((out, features), (out, rank), (rank, features))
    )
    layer = SparseLowRankLinear(S, U, V, None if weight.bias is None else weight.bias.to("meta"))
    weight.put(layer)
    return layer


def own_weights(model: "PreTrainedModel") -> dict[str, CompressibleWeight]:
    """Return what can be compressed as the model's own class has it before anything is compressed, without weights."""
    with torch.device("meta"):
        own = type(model)(copy.deepcopy(model.config))
    return compressible(own)  # which asks modules with numbers, so not on that device
