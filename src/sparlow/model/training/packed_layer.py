"""A compressed block while it is trained: of S only the kept entries are parameters, so zeros stay zero.

Trained are the compressed layers (S on its support, U, V, bias) and the norms. All else that a block holds stays as it
is, to the bit: layers that were left dense, routers, fused experts, convolutions, and vectors of another meaning than a
norm's, such as the decays of a state space. A few windows are too little to train what the report calls unchanged, and
routers least of all.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparlow.model.artefact.layers import SparseLowRankLinear, compressed_layers
from sparlow.model.forward.decoder import is_norm

LARGEST_POWER = 30  # of two, by which columns of U are scaled


class Packed(nn.Module):
    """A compressed layer while it is trained: the kept entries of S as one vector, in float32.

    Columns of U come out of some methods hundreds of times as long as rows of V, and a step of Adam, which has one size
    for all, then breaks the layer. So they are brought to a length of about 1, by powers of two, which round nothing.
    """

    mask: Tensor
    lengths: Tensor

    def __init__(self, layer: SparseLowRankLinear) -> None:
        super().__init__()
        S = layer.S.detach()
        self.register_buffer("mask", S != 0, persistent=False)  # (out, in)
        self.values = nn.Parameter(S[self.mask].float())
        U, V = layer.U.detach().float(), layer.V.detach().float()
        self.register_buffer("lengths", _powers(torch.linalg.vector_norm(U, dim=0)), persistent=False)  # (r,)
        self.U, self.V = nn.Parameter(U / self.lengths), nn.Parameter(V * self.lengths[:, None])
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Return x (S + U V)ᵀ + b for x (…, in)."""
        # one product with S + U V: its gradient gives those of S, U and V without products over tokens
        S = torch.zeros(self.mask.shape, device=x.device).masked_scatter(self.mask, self.values)
        return functional.linear(x, (S + self.U @ self.V).to(x.dtype), self.bias)

    def unpack_into(self, layer: SparseLowRankLinear) -> None:
        """Write the result back; what rounds to zero takes the smallest number of its sign instead, to stay kept."""
        values, dtype = self.values.detach(), layer.S.dtype
        rounded = values.to(dtype)
        with torch.no_grad():
            layer.S.masked_scatter_(self.mask, torch.where(rounded == 0, _smallest(values, dtype), rounded))
            layer.U.copy_(self.U * self.lengths)
            layer.V.copy_(self.V / self.lengths[:, None])


def _smallest(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The smallest number of ``dtype`` with the sign of each value.

    In float16 that is a subnormal one, 2⁻²⁴: its smallest normal number, 6e-5, is a weight like others. In types with
    the range of float32 it is a normal number, 1e-38: some devices take smaller ones for zero.
    """
    smallest = max(torch.finfo(dtype).tiny * torch.finfo(dtype).eps, torch.finfo(torch.float32).tiny)
    return torch.full_like(values, smallest).copysign(values).to(dtype)


def _powers(lengths: Tensor) -> Tensor:
    """The powers of two that are nearest; 1 where a length is 0."""
    powers = lengths.log2().round().clamp(-LARGEST_POWER, LARGEST_POWER)
    return torch.where(lengths > 0, powers, 0).exp2()


@contextmanager
def packed(block: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Put packed layers in the place of the compressed ones; what is trained has gradients, until afterwards."""
    layers = compressed_layers(block)
    trained = {name: Packed(layer) for name, layer in layers.items()}
    wanted: dict[nn.Parameter, bool] = {p: p.requires_grad for p in block.parameters()}
    training = block.training
    for name, layer in trained.items():
        block.set_submodule(name, layer)
    block.eval().requires_grad_(requires_grad=False)
    for p in trained_parameters(block):
        p.requires_grad_()
    try:
        with _in_float32(list(block.parameters())):
            yield [layer.values for layer in trained.values()]
        for name, compressed in layers.items():
            trained[name].unpack_into(compressed)
    finally:
        for name, compressed in layers.items():
            block.set_submodule(name, compressed)
        for p, grad in wanted.items():
            p.requires_grad_(grad)
            p.grad = None
        block.train(training)


def trained_parameters(block: nn.Module) -> list[nn.Parameter]:
    """What is trained of a block with packed layers: those, and norms."""
    found: dict[nn.Parameter, None] = {}  # each once, however many modules share it
    for module in block.modules():
        if isinstance(module, Packed) or is_norm(module):
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
            p.copy_(torch.where(lost, _smallest(p, dtype).to(p.dtype), rounded))
