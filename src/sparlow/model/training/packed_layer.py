"""A compressed block while it is trained: of S only the kept entries are parameters, so zeros stay zero.

Trained are the compressed layers (S on its support, U, V, bias) and the norms. All else that a block holds stays as it
is, to the bit: layers that were left dense, routers, convolutions, and vectors of another meaning than a
norm's, such as the decays of a state space. A few windows are too little to train what the report calls unchanged, and
routers least of all.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparlow.model.artefact.layers import SparseLowRankLinear, compressed_layers
from sparlow.model.artefact.stored_form import StoredForm
from sparlow.model.forward.decoder import is_norm
from sparlow.model.training.trained_parts import PARTS, Int8LowRank, KeptValues, LowRank, OnGrid, smallest


class Packed(nn.Module):
    """A compressed layer while it is trained, of which ``sparse`` gives S and ``low_rank`` U V.

    The layer's own S is let go until ``unpack_into``.
    """

    def __init__(self, layer: SparseLowRankLinear) -> None:
        super().__init__()
        form = layer.stored or StoredForm()
        S, U, V = layer.S.detach(), layer.U.detach(), layer.V.detach()
        dtype = form.dtype or S.dtype
        self.sparse = (OnGrid.of(S, form.values, dtype) if form.values else None) or KeptValues(S)
        self.low_rank = Int8LowRank(U, V, form.factors, dtype) if form.factors and layer.rank else LowRank(U, V)
        self.bias, self._form, self._kind = layer.bias, form, S.dtype
        layer.S.data = S.new_empty(0)

    def forward(self, x: Tensor) -> Tensor:
        """Return x (S + U V)ᵀ + b for x (…, in)."""
        # one product with S + U V: its gradient gives those of S, U and V without products over tokens
        return functional.linear(x, (self.sparse() + self.low_rank()).to(x.dtype), self.bias)

    @torch.no_grad()
    def unpack_into(self, layer: SparseLowRankLinear) -> None:
        """Write the result back, with how it is stored."""
        layer.S.data = self.sparse.result(self._kind)
        U, V = self.low_rank.result()
        layer.U.copy_(U)
        layer.V.copy_(V)
        if isinstance(self.sparse, OnGrid):
            self._form = replace(self._form, values=self.sparse.stored())
        if isinstance(self.low_rank, Int8LowRank):
            self._form = replace(self._form, factors=self.low_rank.stored())
        layer.stored = self._form if layer.stored else None


@contextmanager
def packed(block: nn.Module) -> Iterator[None]:
    """Put packed layers in the place of the compressed ones; what is trained has gradients, until afterwards."""
    layers = compressed_layers(block)
    trained: dict[str, Packed] = {}
    wanted: dict[nn.Parameter, bool] = {p: p.requires_grad for p in block.parameters()}
    training = block.training
    try:
        for name, layer in layers.items():
            trained[name] = Packed(layer)
            block.set_submodule(name, trained[name])
        block.eval().requires_grad_(requires_grad=False)
        for p in trained_parameters(block):
            p.requires_grad_()
        with _in_float32(list(block.parameters())):
            yield
    finally:
        for name in list(trained):
            trained.pop(name).unpack_into(layers[name])  # whose numbers are let go before the next is unpacked
            block.set_submodule(name, layers[name])
        for p, grad in wanted.items():
            p.requires_grad_(grad)
            p.grad = None
        block.train(training)


def trained_parameters(block: nn.Module) -> list[nn.Parameter]:
    """What is trained of a block with packed layers: those, and norms."""
    found: dict[nn.Parameter, None] = {}  # each once, however many modules share it
    for module in block.modules():
        if isinstance(module, (Packed, *PARTS)) or is_norm(module):
            found |= dict.fromkeys(p for p in module.parameters(recurse=False) if p.numel())
    return list(found)


@contextmanager
def _in_float32(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Widen what is stored in half precision, in which most steps of Adam would round to nothing."""
    half = [(p, p.dtype) for p in parameters if p.dtype in (torch.float16, torch.bfloat16)]
    for p, _ in half:
        p.data = p.data.float()
    try:
        yield
    finally:
        for p, dtype in half:
            p.data = p.data.to(dtype)


def round_through(block: nn.Module, dtype: torch.dtype, exceptions: Sequence[str] = ()) -> None:
    """Round every parameter to ``dtype`` and back, as storing it does, those named in ``exceptions`` left alone."""
    with torch.no_grad():
        for name, p in block.named_parameters():
            if name in exceptions:
                continue
            rounded = p.to(dtype).to(p.dtype)
            lost = (rounded == 0) & (p != 0)  # of S, which must keep its support; of other tensors it does no harm
            p.copy_(torch.where(lost, smallest(p, dtype).to(p.dtype), rounded))
