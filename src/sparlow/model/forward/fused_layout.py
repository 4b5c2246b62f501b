"""Which parameters hold fused experts, and how: told by what the model's own code does with them, and never by a name.

The module that multiplies by the parameters is tried without weights, on a few tokens that all go to the first expert.
What it takes a slice of and multiplies tokens by is a fused weight; a parameter that is used in any other way, or
whose module cannot be tried, stays what it is.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from sparlow.errors import is_out_of_memory
from sparlow.model.forward.arguments import tensors_in
from sparlow.model.forward.fused import (
    DENSE,
    MATRIX,
    STACK,
    FusedWeight,
    Layout,
    TransposedLinear,
    as_asked_for,
    one_after_the_other,
)
from sparlow.model.forward.weightless import TensorWatch

TOKENS = 2  # that are tried
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


Key = tuple[Any, ...]
_known: dict[Key, dict[str, Layout]] = {}


def layouts(root: nn.Module, name: str, module: nn.Module) -> dict[str, Layout]:
    """Return the fused weights among a module's own parameters.

    Args:
        root: What it lies in.
        name: Its name in that.
        module: The module.
    """
    candidates = _candidates(module)
    if not candidates:
        return {}
    callers = _callers(root, name)
    every = candidates | _apart(module)  # what is true of one part does not depend on whether another is taken apart
    shapes = sorted((part, tuple(weight.shape)) for part, weight in every.items())
    key = (*(type(caller) for caller in callers), *shapes, *_numbers(module))
    if key not in _known:
        _known[key] = _tried(callers, candidates)
    return {part: layout for part, layout in _known[key].items() if part in candidates}


def _numbers(module: nn.Module) -> list[tuple[str, int]]:
    """Return the whole numbers that a module keeps: its code divides a matrix into experts by one of them."""
    return sorted((name, value) for name, value in vars(module).items() if type(value) is int)


def _apart(module: nn.Module) -> dict[str, FusedWeight]:
    """Return the parameters of a module that were taken apart."""
    return {name: part for name, part in module.named_children() if isinstance(part, FusedWeight)}


def caller_of(name: str, layout: Layout) -> str:
    """Return the name of the module whose code multiplies by a weight of the module of this name."""
    parts = name.split(".") if name else []
    return ".".join(parts[: len(parts) - layout.above])


def matrices(parameter: Tensor, layout: Layout) -> Tensor:
    """Return a view (experts, …, …) of a parameter, without gradient: the matrix of each expert as it is stored."""
    return parameter.detach().view(layout.experts, *layout.stored(parameter.shape))


def take_apart(root: nn.Module, owner: str, parts: Mapping[str, Layout]) -> None:
    """Replace parameters by fused weights, whose layers share the memory of the parameter they were.

    Args:
        root: What the module lies in.
        owner: The name of the module in that.
        parts: Some of its parameters, and how they hold their experts.
    """
    module = root.get_submodule(owner)
    for part, layout in parts.items():
        parameter = module._parameters.get(part)  # noqa: SLF001 - attributes of modules have no type
        if parameter is None:  # it was taken apart before
            continue
        layers = [_layer(matrix, parameter, layout) for matrix in matrices(parameter, layout)]
        delattr(module, part)
        fused = FusedWeight(layers, layout.stored(parameter.shape), layout)
        module.add_module(part, fused.train(module.training))
        one_after_the_other(root.get_submodule(caller_of(owner, layout)))


def put_together(root: nn.Module) -> None:
    """Make parameters again of the fused weights all of whose layers are dense."""
    for name, fused in list(root.named_modules()):
        if not isinstance(fused, FusedWeight) or not all(type(layer) in DENSE for layer in fused.children()):
            continue
        owner, _, part = name.rpartition(".")
        module = root.get_submodule(owner)
        gradient = next(fused.parameters()).requires_grad
        with torch.no_grad():
            whole = nn.Parameter(fused.whole().contiguous(), gradient)
        delattr(module, part)
        module.register_parameter(part, whole)
    as_asked_for(root)


def _layer(matrix: Tensor, like: nn.Parameter, layout: Layout) -> nn.Module:
    weight = nn.Parameter(matrix, like.requires_grad)
    if layout.transposed:
        return TransposedLinear(weight)
    layer = object.__new__(nn.Linear)  # its own way draws numbers, even of a model without any
    nn.Module.__init__(layer)
    layer.out_features, layer.in_features = matrix.shape
    layer.weight = weight
    layer.register_parameter("bias", None)
    return layer


def _callers(root: nn.Module, name: str) -> list[nn.Module]:
    """Return the modules whose code may multiply by a module's parameters: itself, and the one around it."""
    found = [root.get_submodule(name)]
    if name:
        found.append(root.get_submodule(name.rpartition(".")[0]))
    return found


def _candidates(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that may be fused weights by their shapes."""
    if isinstance(module, nn.Linear | nn.Embedding | nn.Conv1d | nn.Conv2d | nn.Conv3d | FusedWeight):
        return {}
    parameters = module._parameters.items()  # noqa: SLF001 - its own alone
    own = {name: p for name, p in parameters if p is not None and p.dtype in _DTYPES and p.numel()}
    stacks = {name: p for name, p in own.items() if p.ndim == STACK and min(p.shape) > 1}
    if stacks or any(not part.flat for part in _apart(module).values()):
        return stacks
    numbers = {value for _, value in _numbers(module) if value > 1}
    return {
        name: p
        for name, p in own.items()
        if p.ndim == MATRIX and any(n * m == len(p) for n in numbers for m in numbers)
    }


def _tried(callers: Sequence[nn.Module], candidates: Mapping[str, nn.Parameter]) -> dict[str, Layout]:
    for above, caller in enumerate(callers):
        for given in _ways(candidates):
            notes = _noted(caller, callers[0], candidates, given)
            found = {
                name: Layout(note.count, *note.uses[0], above)
                for name, note in notes.items()
                if len(set(note.uses)) == 1 and note.right
            }
            if found:
                return {name: layout for name, layout in found.items() if min(layout.shape(candidates[name].shape)) > 1}
    return {}


def _ways(candidates: Mapping[str, nn.Parameter]) -> Iterator[tuple[Any, ...]]:
    """Yield arguments with which modules of experts are called, in all families of transformers."""
    sizes = dict.fromkeys(size for p in candidates.values() for size in p.shape[-2:])
    counts = dict.fromkeys(len(p) for p in candidates.values() if p.ndim == STACK)
    for size in sizes:
        kind: Any = {"device": "meta", "dtype": next(iter(candidates.values())).dtype}
        chosen = torch.zeros(TOKENS, 1, dtype=torch.int64, device="cpu")
        yield torch.empty(TOKENS, size, **kind), chosen, torch.empty(TOKENS, 1, **kind)
        for experts in counts:
            sorted_tokens = torch.empty(experts * TOKENS, size, **kind)
            yield sorted_tokens, [TOKENS] * experts
            yield (sorted_tokens,)


@torch.no_grad()
def _noted(
    caller: nn.Module, owner: nn.Module, candidates: Mapping[str, nn.Parameter], given: tuple[Any, ...]
) -> "dict[str, _Noting]":
    """Run a module without weights, and return what it did with each candidate."""
    memo: dict[int, Any] = {
        id(t): nn.Parameter(torch.empty_like(t, device="meta")) if isinstance(t, nn.Parameter) else t.to("meta")
        for t in (*caller.parameters(), *caller.buffers())
    }
    twin = copy.deepcopy(caller, memo)
    own = memo[id(owner)]
    one_after_the_other(twin)
    derived = _Derived()
    notes = {}
    for name, p in candidates.items():
        notes[name] = _Noting(memo[id(p)], derived)
        del own._parameters[name]  # noqa: SLF001 - so that something else can take its place
        own.add_module(name, notes[name])
    with derived:
        try:
            twin(*given)
        except Exception as error:  # foreign code may fail in any way, and by then has shown what it does
            if is_out_of_memory(error):
                raise
            return notes
    return notes


class _Derived(TensorWatch):
    """Knows which tensors were computed from products with experts."""

    def __init__(self) -> None:
        super().__init__()
        self._held: dict[int, Tensor] = {}  # by the memory they lie in, which they keep

    def add(self, value: Any) -> None:  # noqa: ANN401 - whatever holds tensors
        """Begin with these too."""
        self._held |= {_memory(tensor): tensor for tensor in tensors_in(value)}

    def knows(self, tensor: Tensor) -> bool:
        """Whether a tensor was computed from them."""
        return _memory(tensor) in self._held

    def saw(self, given: Iterator[Tensor], result: Any) -> None:  # noqa: ANN401 - whatever a function returns
        """See ``TensorWatch``."""
        if any(self.knows(tensor) for tensor in given):
            self.add(result)


def _memory(tensor: Tensor) -> int:
    found: int = StorageWeakRef(tensor.untyped_storage()).cdata
    return found


class _Noting(FusedWeight):
    """Stands for a parameter, and notes the products with its slices: (transposed, flat, routed)."""

    def __init__(self, parameter: Tensor, derived: _Derived) -> None:
        layout = Layout(0, transposed=False, flat=parameter.ndim == MATRIX, routed=False, above=0)
        super().__init__((), (0, 0), layout)
        self._of, self._derived = parameter.detach(), derived
        self._counted(0 if layout.flat else len(parameter))
        self.uses: list[tuple[bool, bool, bool]] = []
        self.right = True  # nothing else was done with it

    def _counted(self, experts: int) -> None:
        self.count = experts
        self.matrix = (self._of.numel() // self._of.shape[-1] // max(experts, 1), self._of.shape[-1])

    def __len__(self) -> int:
        return self.count

    def stored(self, number: int) -> Tensor:
        """See ``FusedWeight``."""
        return self._of.view(self.count, -1, self._of.shape[1])[number] if self.flat else self._of[number]

    def whole(self) -> Tensor:
        """See ``FusedWeight``."""
        self.right = False
        return self._of

    @property
    def shape(self) -> torch.Size:
        """See ``FusedWeight``."""
        return self._of.shape

    @property
    def dtype(self) -> torch.dtype:
        """See ``FusedWeight``."""
        return self._of.dtype

    @property
    def device(self) -> torch.device:
        """See ``FusedWeight``."""
        return self._of.device

    def view(self, *shape: Any) -> Any:  # noqa: ANN401 - numbers or a tuple of them
        """See ``FusedWeight``; the view of a matrix says how many experts there are."""
        wanted = torch.empty(self._of.shape, device="meta").view(*shape).shape
        if self.flat and len(wanted) == STACK:
            self._counted(wanted[0])
        return super().view(*shape) if self.count else self.whole().view(*shape)

    reshape = view

    def product(self, number: int, x: Tensor, *, transposed: bool) -> Tensor | None:
        """See ``FusedWeight``."""
        W = self.stored(number)
        y = x @ (W if transposed else W.T)
        self.uses.append((transposed, self.flat, not self._derived.knows(x)))
        self._derived.add(y)
        return y

    def together(self, products: Sequence[Tensor]) -> Tensor:
        """See ``FusedWeight``."""
        found = super().together(products)
        self._derived.add(found)
        return found
