"""Which layers of a block are computed from which: seen in a forward, without knowing any architecture.

A layer that reads what is computed from the output of another can be compressed behind it, on the inputs that the
compressed one gives it. Layers of which none is computed from another, such as query, key and value, or all experts'
first layers, are compressed together: they are a stage.
"""

from collections.abc import Callable, Collection, Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from sparlow.distributed import Processes
from sparlow.finite import all_finite
from sparlow.model.forward.arguments import tensors_in
from sparlow.model.forward.block_pass import BlockPass, run_block
from sparlow.model.forward.compressible import CompressibleWeight, fused_of
from sparlow.model.forward.compressible import called as called_in
from sparlow.model.forward.input_statistics import Stage, collect_statistics

INPUT = ""  # stands among the names of layers for what enters the block
Origins = frozenset[str]
NONE: Origins = frozenset()


@dataclass
class Dependences:
    """From which layers the inputs of a block's layers are computed.

    Attributes:
        before: For each layer that was called, all layers that its input was computed from, in any of its calls.
        repeated: Layers that were called more than once in one forward.
    """

    before: dict[str, set[str]] = field(default_factory=dict)
    repeated: set[str] = field(default_factory=set)

    def stages(self, names: Collection[str]) -> tuple[list[Stage], str]:
        """Divide layers into stages, each of which is computed from those before it alone.

        A layer that was never called has no input that could change, and goes into the first.

        Args:
            names: Of the layers that are compressed.

        Returns:
            The stages in order, and why there is only one where the order cannot be told; else nothing.
        """
        found: list[Stage] = []
        left = {name: self.before.get(name, set()) & set(names) for name in names}
        while left:
            ready = [name for name, before in left.items() if not before & left.keys()]
            if not ready:
                some = ", ".join([*left][:3])
                why = f"the inputs of some layers ({some}) are computed from each other's outputs or from their own"
                return [Stage(tuple(names))], why
            once = self.repeated.isdisjoint(ready) and self.before.keys() >= set(ready)
            found.append(Stage(tuple(ready), called_once=once, behind_others=bool(found)))
            for name in ready:
                del left[name]
        return found or [Stage(())], ""

    def like_others(self, fused: Mapping[str, int]) -> None:
        """Suppose of experts that were never called what was seen of another one with the same role.

        Args:
            fused: How many experts have that role, by what their names have in common.
        """
        for name, count in fused.items():
            one = next((number for number in range(count) if f"{name}.{number}" in self.before), None)
            if one is None:
                continue
            found = self.before[f"{name}.{one}"]
            for number in range(count):
                alike = {counterpart(other, one, number, fused) for other in found}
                self.before.setdefault(f"{name}.{number}", alike)

    def agreed(self, processes: Processes) -> None:
        """Add what the other processes saw, so that all find the same stages."""
        for told in processes.all_gather({name: sorted(before) for name, before in self.before.items()}):
            for name, before in told.items():
                self.before.setdefault(name, set()).update(before)


def counterpart(name: str, one: int, other: int, fused: Container[str]) -> str:
    """Return the layer that is to another expert what the layer of this name is to one; itself if it is of none."""
    role, _, number = name.rpartition(".")
    return f"{role}.{other}" if role in fused and number == str(one) else name


@torch.no_grad()
def observe_dependences(through: BlockPass, names: Collection[str]) -> Dependences:
    """Run a dense block until each layer has been called, most often on its first micro-batch alone.

    Of experts with one role, it is enough to see one.

    Args:
        through: The block and its inputs.
        names: Of the layers that are to be seen.

    Raises:
        InputError: An output is not finite; the message names the first layer concerned.
    """
    found = Dependences()
    fused = {name: len(weight) for name, weight in fused_of(through.block).items()}
    with dependences_noted([(through.block, through.weights, found)]):
        for i, x in enumerate(through.hidden):
            if all(name in found.before or found.before.keys() & _alike(name, fused) for name in names):
                break
            if len(x) and not all_finite(run_block(through.block, x, through.call(i))):
                collect_statistics(through, _Unused)  # which says what is not
    found.agreed(through.processes)
    found.like_others(fused)
    return found


def _alike(name: str, fused: Mapping[str, int]) -> set[str]:
    """Return the layers of all experts that have the role of a layer; of one that is no expert's, none."""
    role = name.rpartition(".")[0]
    return {f"{role}.{number}" for number in range(fused.get(role, 0))}


Noted = tuple[nn.Module, Mapping[str, CompressibleWeight], Dependences]


@contextmanager
def dependences_noted(blocks: Collection[Noted]) -> Iterator[None]:
    """Note in every forward inside of this context from which layers of its block a layer's input is computed.

    Where an input cannot be traced back to what entered the block, because foreign code computes behind torch's back,
    it counts as computed from all layers that were called before.

    Args:
        blocks: Each with its layers, and what takes the notes.
    """
    with _Tracer() as tracer, ExitStack() as stack:
        for block, weights, found in blocks:
            for hook in _hooks(tracer, block, weights, found):
                stack.callback(hook.remove)
        yield


def _hooks(
    tracer: "_Tracer", block: nn.Module, weights: Mapping[str, CompressibleWeight], found: Dependences
) -> Iterator[Any]:
    called: list[str] = []  # in this forward

    def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        called.clear()
        tracer.clear()
        tracer.add((args, kwargs), frozenset([INPUT]))

    def before(name: str) -> Callable[..., None]:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            origins = tracer.origins((*args, *kwargs.values())[0])
            known = origins if INPUT in origins else {*origins, *called}
            found.before.setdefault(name, set()).update(known - {INPUT})
            if name in called:
                found.repeated.add(name)
            called.append(name)

        return note

    def after(name: str) -> Callable[..., None]:
        def note(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:  # noqa: ANN401 - what a foreign forward returns
            tracer.add(output, frozenset([name]))

        return note

    yield block.register_forward_pre_hook(begin, with_kwargs=True)
    for name, weight in called_in(weights).items():
        module = block.get_submodule(weight.reads)
        yield module.register_forward_pre_hook(before(name), with_kwargs=True)
        yield module.register_forward_hook(after(name))


class _Tracer(TorchDispatchMode):
    """Knows what was computed from what, by the memory that tensors lie in: views and changes in place are seen too."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in torch
        self._known: dict[int, tuple[StorageWeakRef, Origins]] = {}  # held, so that an address is not taken by another

    def clear(self) -> None:
        """Forget everything."""
        self._known.clear()

    def add(self, value: Any, origins: Origins) -> None:  # noqa: ANN401 - whatever holds tensors
        """Count the tensors in a value as computed from these too."""
        for tensor in tensors_in(value):
            key = StorageWeakRef(tensor.untyped_storage())
            self._known[key.cdata] = key, origins | self._known.get(key.cdata, (key, NONE))[1]

    def origins(self, value: Any) -> Origins:  # noqa: ANN401 - whatever holds tensors
        """Return what the tensors in a value were computed from."""
        keys = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors_in(value)]
        return NONE.union(*(self._known.get(key.cdata, (key, NONE))[1] for key in keys))

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - torch's signature
        types: Any,  # noqa: ANN401 - the same
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - the same
        given = dict(kwargs or {})
        result = func(*args, **given)
        origins = self.origins((args, given))
        if origins:
            self.add(result, origins)
            names = [argument.name for argument in func._schema.arguments if argument.is_write]  # noqa: SLF001
            self.add([given[name] for name in names if name in given], origins)
            positions = zip(func._schema.arguments, args, strict=False)  # noqa: SLF001
            self.add([value for argument, value in positions if argument.is_write], origins)
        return result


class _Unused:
    """A statistic of which only the pass over the inputs is wanted."""

    def __init__(self, features: int, device: torch.device) -> None:
        pass

    def add(self, x: torch.Tensor, /) -> None:
        """Take in nothing."""
