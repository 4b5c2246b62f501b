"""Compressible weights: matrices that multiply an input, wherever a model keeps them.

Everything works on a layer through ``CompressibleWeight``: budgets and plans ask for its name and shape, statistics
for the module whose input it reads, and the solver for W (out, in). ``put`` then replaces the layer by the result.
Three forms are recognised, by what they compute and not by their class: a linear layer (x Wᵀ + b), one that stores Wᵀ,
as GPT-2's Conv1D does (x W + b), and one expert's slice of a parameter that holds many, see ``fused``. Any other form
needs a class of its own, and a line in ``compressible``:

* an embedding or output head: as a linear layer, ``name`` and ``reads`` being those of a module outside of the blocks;
* a packed or quantised layer: ``read`` unpacks, ``put`` replaces it.
"""

import copy
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparlow.errors import is_out_of_memory
from sparlow.model.forward.fused import FusedWeight, Layout, TransposedLinear
from sparlow.model.forward.fused_layout import layouts, matrices, take_apart

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


@dataclass(frozen=True)
class ExpertWeight:
    """The weight of one expert in a parameter that holds those of all.

    Args:
        root: The block (or model) that the parameter is in.
        owner: The name in it of the module whose parameter it is.
        part: The name of the parameter in that.
        number: Of the expert.
        layout: How the parameter holds its experts.
    """

    root: nn.Module
    owner: str
    part: str
    number: int
    layout: Layout

    @property
    def fused(self) -> str:
        """The name of the parameter in the root."""
        return f"{self.owner}.{self.part}".lstrip(".")

    @property
    def name(self) -> str:
        """See ``CompressibleWeight``."""
        return f"{self.fused}.{self.number}"

    @property
    def _fused(self) -> nn.Parameter | FusedWeight:
        """The parameter, or what stands in its place once it was taken apart."""
        owner = self.root.get_submodule(self.owner)
        found: nn.Parameter | FusedWeight = getattr(owner, self.part)
        return found

    @property
    def shape(self) -> tuple[int, int]:
        """See ``CompressibleWeight``."""
        return self.layout.shape(self._fused.shape)

    @property
    def transposed(self) -> bool:
        """See ``CompressibleWeight``."""
        return self.layout.transposed

    @property
    def reads(self) -> str:
        """See ``CompressibleWeight``; the module is there once the parameter was taken apart."""
        return self.name

    @property
    def bias(self) -> Tensor | None:
        """See ``CompressibleWeight``; where experts have one, it is a parameter of its own and stays as it is."""
        return None

    @property
    def dtype(self) -> torch.dtype:
        """See ``CompressibleWeight``."""
        return self._fused.dtype

    @property
    def device(self) -> torch.device:
        """See ``CompressibleWeight``."""
        return self._fused.device

    @property
    def nbytes(self) -> int:
        """See ``CompressibleWeight``."""
        rows, columns = self.shape
        return rows * columns * self.dtype.itemsize

    def parameters(self) -> Iterator[nn.Parameter]:
        """See ``CompressibleWeight``; until it is taken apart, it is that of all experts."""
        fused = self._fused
        if isinstance(fused, FusedWeight):
            yield from fused.layer(self.number).parameters()
        else:
            yield fused

    def read(self) -> Tensor:
        """See ``CompressibleWeight``."""
        fused = self._fused
        if isinstance(fused, FusedWeight):
            return self.as_stored(fused.stored(self.number).detach())
        return self.as_stored(matrices(fused, self.layout)[self.number])

    def as_stored(self, W: Tensor) -> Tensor:
        """See ``CompressibleWeight``."""
        return W.T if self.transposed else W

    def put(self, layer: nn.Module) -> None:
        """See ``CompressibleWeight``."""
        take_apart(self.root, self.owner, {self.part: self.layout})
        self.root.set_submodule(self.name, layer.train(self.root.training))


def compressible(block: nn.Module) -> dict[str, CompressibleWeight]:
    """Return the compressible weights of a block or a model by name, in module order."""
    found: dict[str, CompressibleWeight] = {}
    for name, module in block.named_modules():
        weight = weight_of(block, name, module)
        if weight is not None:
            found[name] = weight
        for part, layout in layouts(block, name, module).items():
            experts = (ExpertWeight(block, name, part, number, layout) for number in range(layout.experts))
            found |= {expert.name: expert for expert in experts}
    return found


def experts_apart(block: nn.Module, names: Container[str]) -> None:
    """Take apart the parameters of a block that hold experts, those of which an expert is among ``names``.

    Names stay what they were, and what each module computes.
    """
    for name, module in list(block.named_modules()):
        found = layouts(block, name, module)
        prefix = f"{name}." if name else ""
        wanted = {
            part: layout
            for part, layout in found.items()
            if any(f"{prefix}{part}.{number}" in names for number in range(layout.experts))
        }
        if wanted:
            take_apart(block, name, wanted)


def called(weights: Mapping[str, CompressibleWeight]) -> dict[str, CompressibleWeight]:
    """Return those that a module is called for: all but experts in parameters that were not taken apart."""
    return {name: weight for name, weight in weights.items() if not isinstance(weight, ExpertWeight)}


def fused_of(block: nn.Module) -> dict[str, FusedWeight]:
    """Return the fused weights of a block that were taken apart, by name."""
    return {name: module for name, module in block.named_modules() if isinstance(module, FusedWeight)}


def expert_of(root: nn.Module, name: str) -> ExpertWeight | None:
    """Return the weight of an expert by its name, if it is in a parameter that holds many; else None."""
    fused, _, number = name.rpartition(".")
    owner, _, part = fused.rpartition(".")
    try:
        found = layouts(root, owner, root.get_submodule(owner)).get(part)
    except AttributeError:  # as torch says that there is no such module
        return None
    if found is None or not number.isdecimal() or int(number) >= found.experts:
        return None
    return ExpertWeight(root, owner, part, int(number), found)


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
    if type(module) is TransposedLinear:
        return LinearWeight(root, name, module, transposed=True)
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
        except Exception as error:  # a foreign forward may fail in any way, and then is none of ours
            if is_out_of_memory(error):
                raise
            return False
    return isinstance(y, Tensor) and y.shape == expected.shape and torch.allclose(y, expected, atol=1e-6)


def _own(module: nn.Module, name: str) -> Tensor:
    value = module._parameters[name]  # noqa: SLF001 - attributes of modules have no type
    if value is None:
        raise AttributeError(name)
    return value
