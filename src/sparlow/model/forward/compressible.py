"""Compressible weights: matrices that multiply an input, wherever a model keeps them.

Everything works on a layer through ``CompressibleWeight``: budgets and plans ask for its name and shape, statistics
for the module whose input it reads, and the solver for W (out, in). ``put`` then replaces the layer by the result. Two
forms are recognised, by what they compute and not by their class: a linear layer (x Wᵀ + b), and one that stores Wᵀ, as
GPT-2's Conv1D does (x W + b). Any other form needs a class of its own, and a line in ``compressible``:

* one expert's slice of a 3-D parameter: ``read`` gives the slice, ``reads`` names what the expert's tokens pass through
  (slices of one expert that read the same input then share its statistics), and ``put`` hands the layer to the module
  that stands in for the fused one;
* an embedding or output head: as a linear layer, ``name`` and ``reads`` being those of a module outside of the blocks;
* a packed or quantised layer: ``read`` unpacks, ``put`` replaces it.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class CompressibleWeight(Protocol):
    """One weight matrix that a block (or a model) multiplies an input by; the module docstring lists possible forms."""

    @property
    def name(self) -> str:
        """Name of the layer within the block, as used in records, budgets and files."""

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
        """The bias (out,), without gradient; None if there is none."""

    @property
    def dtype(self) -> torch.dtype:
        """Data type of W in memory, which may differ from the stored one."""

    @property
    def device(self) -> torch.device:
        """Device of W; meta if it has not been read."""

    @property
    def nbytes(self) -> int:
        """Bytes of W and the bias."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that ``put`` replaces."""

    def read(self) -> Tensor:
        """Return W (out, in), without gradient. It may share memory with the layer."""

    def as_stored(self, W: Tensor) -> Tensor:
        """Return a weight (out, in) in the layout in which the layer's own class stores it: the inverse of ``read``."""

    def put(self, layer: nn.Module) -> None:
        """Replace the layer by ``layer``, which maps an input (…, in) to (…, out) and includes the bias."""


@dataclass(frozen=True)
class LinearWeight:
    """The weight of a module that computes x Wᵀ + b, or x W + b where it is stored transposed.

    Args:
        root: The block (or model) that the module is in.
        name: The name of the module in it.
        module: The module.
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
    """Return the compressible weights of a block or a model by name, in module order."""
    found = {name: weight_of(block, name, module) for name, module in block.named_modules()}
    return {name: weight for name, weight in found.items() if weight is not None}


def weight_of(root: nn.Module, name: str, module: nn.Module) -> CompressibleWeight | None:
    """Return the compressible weight of one module of ``root``; None if it has none."""
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
    """Whether a module's forward computes exactly x Wᵀ + b, or x W + b if it is transposed.

    The forward is tried with a small weight made here, because the module's own weight may not be loaded. A router that
    also selects, a layer with grouped outputs, or an embedding gives something else, or fails.
    """
    rows, columns = _own(module, "weight").shape
    here: Any = {"device": "cpu", "dtype": torch.float32}  # whatever the caller has set as default
    sizes = {rows: 4, columns: 4} if rows == columns else {rows: 4, columns: 3}
    W = torch.linspace(-1, 1, sizes[rows] * sizes[columns], **here).square().view(sizes[rows], sizes[columns])
    has_bias = module._parameters.get("bias") is not None  # noqa: SLF001 - attributes of modules have no type
    bias = torch.linspace(1, 2, sizes[columns if transposed else rows], **here) if has_bias else None
    probe = copy.copy(module)
    probe.__dict__ |= {name: sizes.get(value, value) for name, value in vars(probe).items() if type(value) is int}
    probe.__dict__["_parameters"] = {"weight": nn.Parameter(W), "bias": None if bias is None else nn.Parameter(bias)}
    x = torch.linspace(-1, 1, 2 * sizes[rows if transposed else columns], **here).reshape(1, 2, -1)
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
