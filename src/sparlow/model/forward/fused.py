"""Fused experts taken apart: a parameter that holds the weights of many experts becomes one linear layer an expert.

transformers keeps the experts of a block in parameters of three dimensions (experts, …, …), and its own code takes a
slice, ``self.up_proj[expert]``, and multiplies the expert's tokens by it. A ``FusedWeight`` stands in the place of such
a parameter. What it gives for a slice is no tensor, but hands a product with it to the linear layer of that expert. So
the model's own code routes, and all that works on linear layers (hooks, compressed layers, packed ones) works on
experts. Other uses of a slice, or of the whole, get the dense numbers.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

MATRIX, STACK = 2, 3  # dimensions of a slice, and of all slices together
_SHARED = "_config_of_the_model"  # where a module keeps what it was given, while it has a config of its own
_PRODUCTS = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
_BATCHED = (torch.bmm, Tensor.bmm, *_PRODUCTS)


class TransposedLinear(nn.Module):
    """y = x W for a weight W (in, out): one expert of a parameter that is stored in this way."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, in) to (…, out)."""
        return x @ self.weight


@dataclass(frozen=True)
class Layout:
    """How a parameter holds its experts.

    Attributes:
        experts: How many.
        transposed: Each is (in, out), and not (out, in).
        flat: They are the rows of one matrix, one expert after another.
        routed: They multiply what enters the module that calls them, and not what other experts' weights gave.
        above: How many levels above its module the one lies whose code multiplies by it.
    """

    experts: int
    transposed: bool
    flat: bool
    routed: bool
    above: int

    def stored(self, shape: Sequence[int]) -> tuple[int, int]:
        """Return the shape of one expert's matrix in a parameter of this shape."""
        rows, columns = shape[-2:]
        return (rows // self.experts if self.flat else rows), columns

    def shape(self, shape: Sequence[int]) -> tuple[int, int]:
        """Return (out, in) of one expert in a parameter of this shape."""
        rows, columns = self.stored(shape)
        return (columns, rows) if self.transposed else (rows, columns)


DENSE = (nn.Linear, TransposedLinear)  # layers of an expert that is not compressed


class FusedWeight(nn.Module):
    """Stands in the place of a parameter that holds one matrix an expert; its children are linear layers, by number.

    Args:
        layers: One an expert.
        shape: Of each expert's matrix, as the parameter has it.
        layout: How the parameter holds the experts.
    """

    _is_hf_initialized = True  # transformers' mark: it would fill the parameter at random otherwise

    def __init__(self, layers: Sequence[nn.Module], shape: tuple[int, int], layout: Layout) -> None:
        super().__init__()
        for number, layer in enumerate(layers):
            self.add_module(str(number), layer)
        self.matrix, self.layout = shape, layout

    def __len__(self) -> int:
        return len(self._modules)

    def layer(self, number: int) -> Any:  # noqa: ANN401 - whatever stands for a linear layer
        """Return the layer of an expert; IndexError if there is none."""
        count = len(self)
        if not -count <= number < count:
            raise IndexError(number)
        return self._modules[str(number % count)]

    def stored(self, number: int) -> Tensor:
        """Return the matrix of an expert as the parameter has it, dense."""
        layer = self.layer(number)
        W: Tensor = layer.weight
        return W if isinstance(layer, TransposedLinear) or not self.layout.transposed else W.T

    def product(self, number: int, x: Tensor, *, transposed: bool) -> Tensor | None:
        """Multiply tokens (…, in) by the layer of an expert; None if that is not what was asked for.

        Args:
            number: Of the expert.
            x: Its tokens.
            transposed: Whether x is multiplied by the stored matrix as it is, so that this must be (in, out).
        """
        if transposed != self.layout.transposed:
            return None
        if not x.numel():  # an expert without tokens is not looked at
            return x.new_zeros(*x.shape[:-1], self.matrix[1 if transposed else 0])
        y: Tensor = self.layer(number)(x)
        return y

    def together(self, products: Sequence[Tensor]) -> Tensor:
        """Return the products of all experts in one tensor."""
        return torch.stack(list(products))

    def whole(self) -> Tensor:
        """Return the parameter as it would be, dense."""
        found = torch.stack([self.stored(number) for number in range(len(self))])
        return found.flatten(0, 1) if self.flat else found

    @property
    def shape(self) -> torch.Size:
        """Of the parameter."""
        rows, columns = self.matrix
        return torch.Size((len(self) * rows, columns) if self.flat else (len(self), rows, columns))

    @property
    def ndim(self) -> int:
        """Of the parameter."""
        return MATRIX if self.flat else STACK

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self._any.dtype

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self._any.device

    @property
    def _any(self) -> Tensor:
        """Some tensor of the weights."""
        found = next(self.parameters(), None)
        return self.stored(0) if found is None else found

    @property
    def flat(self) -> bool:
        """Whether the parameter is one matrix."""
        return self.layout.flat

    def __getitem__(self, index: Any) -> Any:  # noqa: ANN401 - whatever indexes a tensor
        return self.whole()[index] if self.flat else Slices(self)[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.whole()) if self.flat else iter(Slices(self))

    def view(self, *shape: Any) -> Any:  # noqa: ANN401 - numbers or a tuple of them
        """Return the slices, where the shape is theirs; else the dense parameter in this shape."""
        wanted = torch.empty(self.shape, device="meta").view(*shape).shape
        return Slices(self) if wanted == (len(self), *self.matrix) else self.whole().view(*shape)

    reshape = view

    def transpose(self, one: int, other: int) -> Any:  # noqa: ANN401 - slices or a tensor
        """Return the slices transposed, or the dense parameter."""
        return self.whole().transpose(one, other) if self.flat else Slices(self).transpose(one, other)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401 - torch's signature
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - the same
        def seen(x: Any) -> Any:  # noqa: ANN401 - an argument of any function
            return x if not isinstance(x, FusedWeight) else x.whole() if x.flat else Slices(x)

        given = {key: seen(x) for key, x in (kwargs or {}).items()}
        return _Proxy.__torch_function__(func, types, tuple(map(seen, args)), given)


class _Proxy:
    """Something that is used as a tensor, and only computed where it must be."""

    def dense(self) -> Tensor:
        """Return the tensor."""
        raise NotImplementedError

    def result(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        """Return what a function gives, if that is a product of tokens with experts; else None."""
        raise NotImplementedError

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401 - torch's signature
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - the same
        given = dict(kwargs or {})
        own = [x for x in (*args, *given.values()) if isinstance(x, _Proxy)]
        found = own[0].result(func, args, given) if len(own) == 1 else None
        if found is not None:
            return found
        return func(*map(_dense, args), **{key: _dense(x) for key, x in given.items()})

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever a tensor has
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dense(), name)


def _dense(x: Any) -> Any:  # noqa: ANN401 - an argument of any function
    return x.dense() if isinstance(x, _Proxy) else x


class Slice(_Proxy):
    """The matrix of one expert: a product with it is that expert's layer.

    Args:
        of: The fused weight.
        number: Of the expert.
        swapped: It is the transpose of what is stored.
    """

    def __init__(self, of: FusedWeight, number: int, *, swapped: bool = False) -> None:
        self._of, self._number, self._swapped = of, number, swapped

    def dense(self) -> Tensor:
        """See ``_Proxy``."""
        found = self._of.stored(self._number)
        return found.T if self._swapped else found

    def __len__(self) -> int:
        return self._of.matrix[1 if self._swapped else 0]

    @property
    def T(self) -> "Slice":  # noqa: N802 - torch's name
        """Its transpose."""
        return Slice(self._of, self._number, swapped=not self._swapped)

    mT = T  # noqa: N815 - torch's name

    def t(self) -> "Slice":
        """Return its transpose."""
        return self.T

    def transpose(self, one: int, other: int) -> "Slice":
        """Return its transpose, or itself."""
        return self if one % MATRIX == other % MATRIX else self.T

    def __rmatmul__(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self)  # type: ignore[arg-type]  # which torch takes as a tensor

    def result(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        """See ``_Proxy``."""
        if func is functional.linear:
            x, matrix, bias = [*args, *(kwargs[key] for key in ("input", "weight", "bias") if key in kwargs), None][:3]
            y = self._product(x, transposed=self._swapped) if matrix is self else None
            return y if y is None or bias is None else y.add(bias)
        if func not in _PRODUCTS or len(args) != 2 or args[1] is not self:  # noqa: PLR2004 - x M
            return None
        return Slice._product(self, args[0], transposed=not self._swapped)

    def _product(self, x: Tensor, *, transposed: bool) -> Tensor | None:
        return self._of.product(self._number, x, transposed=transposed)


class Slices(_Proxy):
    """The matrices of all experts, (experts, …, …).

    Args:
        of: The fused weight.
        swapped: Each is the transpose of what is stored.
    """

    def __init__(self, of: FusedWeight, *, swapped: bool = False) -> None:
        self._of, self._swapped = of, swapped

    def dense(self) -> Tensor:
        """See ``_Proxy``."""
        found = self._of.whole()
        found = found.unflatten(0, (len(self._of), -1)) if self._of.flat else found
        return found.mT if self._swapped else found

    def __len__(self) -> int:
        return len(self._of)

    def __getitem__(self, index: Any) -> Any:  # noqa: ANN401 - whatever indexes a tensor
        scalar = isinstance(index, Tensor) and not index.ndim and not index.is_floating_point()
        single = scalar or isinstance(index, int)
        if not single or isinstance(index, bool):
            return self.dense()[index]
        number = int(index)
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        return Slice(self._of, number % len(self), swapped=self._swapped)

    def __iter__(self) -> Iterator[Slice]:
        return (Slice(self._of, number, swapped=self._swapped) for number in range(len(self)))

    def unbind(self, dim: int = 0) -> Any:  # noqa: ANN401 - slices or tensors
        """Return the slices one by one."""
        return self.dense().unbind(dim) if dim else tuple(self)

    def transpose(self, one: int, other: int) -> Any:  # noqa: ANN401 - slices or a tensor
        """Return each transposed, or the dense numbers."""
        if {one % STACK, other % STACK} != {1, 2}:
            return self.dense().transpose(one, other)
        return Slices(self._of, swapped=not self._swapped)

    @property
    def mT(self) -> "Slices":  # noqa: N802 - torch's name
        """Each transposed."""
        return Slices(self._of, swapped=not self._swapped)

    def result(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        """See ``_Proxy``."""
        if func not in _BATCHED or len(args) != 2 or args[1] is not self or kwargs:  # noqa: PLR2004 - x M
            return None
        x = args[0]
        if x.ndim != STACK or len(x) != len(self):
            return None
        found = [self._product(number, x[number]) for number in range(len(self))]
        return None if any(y is None for y in found) else self._of.together([y for y in found if y is not None])

    def _product(self, number: int, x: Tensor) -> Tensor | None:
        """Multiply by the matrix of one expert, without the zeros that its model may give it for other tokens."""
        mine = None if x.is_meta else x.detach().any(-1)
        if mine is None or bool(mine.all()):
            return self._of.product(number, x, transposed=not self._swapped)
        y = self._of.product(number, x[mine], transposed=not self._swapped)
        return None if y is None else y.new_zeros(len(x), y.shape[-1]).index_put((mine,), y)


def one_after_the_other(module: nn.Module) -> None:
    """Let the experts in a module be multiplied one after the other, whatever implementation its model asks for.

    transformers' other implementations multiply by the whole parameter, and take no slice of it.
    """
    for part in module.modules():
        own = vars(part)
        asked = getattr(own.get("config"), "_experts_implementation", None)
        if hasattr(part, "is_transposed") and asked not in (None, "eager"):
            own[_SHARED] = own["config"]
            own["config"] = copy.copy(own["config"])  # its own, for all modules of a model share one
            vars(own["config"])["_experts_implementation_internal"] = "eager"


def as_asked_for(module: nn.Module) -> None:
    """Undo ``one_after_the_other`` in every module that has no fused weights any more."""
    for part in module.modules():
        if _SHARED in vars(part) and not any(isinstance(inside, FusedWeight) for inside in part.modules()):
            vars(part)["config"] = vars(part).pop(_SHARED)
