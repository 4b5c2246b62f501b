"""What can be compressed: a weight that multiplies an input, wherever a model keeps it.

All that is done to a layer is done through ``CompressibleWeight``: budgets and plans ask for its name and shape,
statistics for the module whose input it reads, the solver for W (out, in), and ``put`` brings the answer back. Here two
forms are found, by what they compute and not by what they are called: a linear layer (x Wᵀ + b) and one that stores Wᵀ,
as GPT-2's Conv1D does (x W + b). Others need one class each, and their place in ``compressible``:

* one expert's slice of a 3-D parameter: ``read`` gives the slice, ``reads`` names what the expert's tokens pass through
  (slices of one expert that read the same input then share its statistics), and ``put`` hands the layer to the module
  that stands in for the fused one;
* an embedding or output head: as a linear layer, ``name`` and ``reads`` being those of a module outside of the blocks;
* a packed or quantised layer: ``read`` unpacks, ``put`` replaces it.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class CompressibleWeight(Protocol):
    """One weight that a block (or a model) multiplies an input by; see the module for what may stand behind it."""

    @property
    def name(self) -> str:
        """Of the layer, within the block; records, budgets and the files of a result know it by this."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in), however it is stored."""

    @property
    def transposed(self) -> bool:
        """Whether it is stored as (in, out)."""

    @property
    def reads(self) -> str:
        """Name of the module in the block that is called with the input of this weight."""

    @property
    def bias(self) -> Tensor | None:
        """What is added to each output (out,), without gradient."""

    @property
    def dtype(self) -> torch.dtype:
        """Of W where it is now, which is not always the one it is stored in."""

    @property
    def device(self) -> torch.device:
        """Where W is; meta if it was not read."""

    @property
    def nbytes(self) -> int:
        """Bytes of W and the bias."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """What ``put`` takes the place of."""

    def read(self) -> Tensor:
        """Return W (out, in), without gradient; it may share the layer's memory."""

    def as_stored(self, W: Tensor) -> Tensor:
        """Return a weight (out, in) as the layer's own class stores it, which is what ``read`` undoes."""

    def put(self, layer: nn.Module) -> None:
        """Let ``layer`` compute from now on: it maps an input (…, in) to (…, out), the bias included."""


@dataclass(frozen=True)
class LinearWeight:
    """The weight of a module that computes x Wᵀ + b, or x W + b where it is stored transposed.

    Args:
        root: The block (or model) that the module is in.
        name: Of the module in it.
        module: It.
        transposed: The stored weight is (in, out).
    """

    root: nn.Module
    name: str
    module: nn.Module
    transposed: bool = False

    @property
    def _stored(self) -> Tensor:
        return _own(self.module, "weight")

    @property
    def shape(self) -> tuple[int, int]:
        """See ``CompressibleWeight``."""
        rows, columns = self._stored.shape
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def reads(self) -> str:
        """See ``CompressibleWeight``."""
        return self.name

    @property
    def bias(self) -> Tensor | None:
        """See ``CompressibleWeight``."""
        bias = self.module._parameters.get("bias")  # noqa: SLF001 - attributes of modules have no type
        return None if bias is None else bias.detach()

    @property
    def dtype(self) -> torch.dtype:
        """See ``CompressibleWeight``."""
        return self._stored.dtype

    @property
    def device(self) -> torch.device:
        """See ``CompressibleWeight``."""
        return self._stored.device

    @property
    def nbytes(self) -> int:
        """See ``CompressibleWeight``."""
        return sum(p.nbytes for p in self.parameters())

    def parameters(self) -> Iterator[nn.Parameter]:
        """See ``CompressibleWeight``."""
        return self.module.parameters()

    def read(self) -> Tensor:
        """See ``CompressibleWeight``."""
        return self.as_stored(self._stored.detach())

    def as_stored(self, W: Tensor) -> Tensor:
        """See ``CompressibleWeight``."""
        return W.T if self.transposed else W

    def put(self, layer: nn.Module) -> None:
        """See ``CompressibleWeight``."""
        self.root.set_submodule(self.name, layer.train(self.module.training))


def compressible(block: nn.Module) -> dict[str, CompressibleWeight]:
    """Return what can be compressed in a block, or in a model, by name, in module order."""
    found = {name: weight_of(block, name, module) for name, module in block.named_modules()}
    return {name: weight for name, weight in found.items() if weight is not None}


def weight_of(root: nn.Module, name: str, module: nn.Module) -> CompressibleWeight | None:
    """Return the weight of one module of ``root``; None if it is none that can be compressed."""
    W = module._parameters.get("weight")  # noqa: SLF001 - attributes of modules have no type
    if W is None or W.ndim != 2 or W.dtype not in _DTYPES:  # noqa: PLR2004 - a matrix
        return None  # a norm, a convolution, quantised or packed
    if isinstance(module, nn.Linear):
        plain = W.shape == (module.out_features, module.in_features) and (
            type(module).forward is nn.Linear.forward or _computes(module, transposed=False)
        )
        return LinearWeight(root, name, module) if plain else None
    alone = module._parameters.keys() <= {"weight", "bias"} and not module._modules and not module._buffers  # noqa: SLF001
    return LinearWeight(root, name, module, transposed=True) if alone and _computes(module, transposed=True) else None


def _computes(module: nn.Module, *, transposed: bool) -> bool:
    """Whether a module's forward is x Wᵀ + b, or x W + b of a transposed one, and nothing else.

    It is asked with a small weight of its own, so that the answer does not need the module's, which may not be loaded.
    A router that also selects, a grouped output, an embedding give something else or fail.
    """
    rows, columns = _own(module, "weight").shape
    sizes = {rows: 4, columns: 4} if rows == columns else {rows: 4, columns: 3}
    W = torch.linspace(-1, 1, sizes[rows] * sizes[columns]).square().view(sizes[rows], sizes[columns])
    has_bias = module._parameters.get("bias") is not None  # noqa: SLF001 - attributes of modules have no type
    bias = torch.linspace(1, 2, sizes[columns if transposed else rows]) if has_bias else None
    probe = copy.copy(module)
    probe.__dict__ |= {name: sizes.get(value, value) for name, value in vars(probe).items() if type(value) is int}
    probe.__dict__["_parameters"] = {"weight": nn.Parameter(W), "bias": None if bias is None else nn.Parameter(bias)}
    x = torch.linspace(-1, 1, 2 * sizes[rows if transposed else columns]).reshape(1, 2, -1)
    expected = nn.functional.linear(x, W.T if transposed else W, bias)
    with torch.no_grad():
        try:
            y = type(module).forward(probe, x)
        except Exception:  # noqa: BLE001 - a foreign forward may fail in any way, and then is none of ours
            return False
    return isinstance(y, Tensor) and y.shape == expected.shape and torch.allclose(y, expected, atol=1e-6)


def _own(module: nn.Module, name: str) -> Tensor:
    value = module._parameters[name]  # noqa: SLF001 - attributes of modules have no type
    if value is None:
        raise AttributeError(name)
    return value
