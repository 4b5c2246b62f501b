"""Moves a model's weights to where a core reads them quickest."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from sparlow.machine import free_memory, memory_available
from sparlow.runtime.packed import PackedLinear, PackedModule
from sparlow.runtime.pages import PAGE, LargePages, has_large_pages


def use_large_pages(model: nn.Module) -> None:
    """Move the weights that every token reads, packed and dense, to large pages where the system has them.

    No number changes, and what is shared stays shared. Packed weights are then no longer mapped from their file. A
    model that fills no such page, one whose packed weights would take more than half of the memory that is free, and
    weights on accelerators or in memory shared with other processes, stay.
    """
    packed_ones, parameters = _by_weight(model), _dense(model)
    stored, dense = sum(modules[0].bytes for modules in packed_ones), sum(p.nbytes for p in parameters)
    if not has_large_pages() or stored + dense < PAGE or stored > memory_available() // 2:
        return
    mover = _Mover()
    for modules in packed_ones:
        packed = modules[0].packed
        bias = None if packed.bias is None else mover.moved(packed.bias)
        new = replace(packed, parts={part: mover.moved(tensor) for part, tensor in packed.parts.items()}, bias=bias)
        for module in modules:
            module.take(new)
    for parameter in parameters:
        parameter.data = mover.moved(parameter.data)
    free_memory()  # where they lay before


class _Mover:
    """Moves each tensor once."""

    def __init__(self) -> None:
        self._pages = LargePages()
        self._known: dict[tuple[int, torch.Size, torch.dtype], Tensor] = {}

    def moved(self, t: Tensor) -> Tensor:
        if not t.numel():
            return torch.empty_like(t)  # else the part of a rank of 0 would keep its whole file mapped
        if not _movable(t):
            return t
        key = (t.data_ptr(), t.shape, t.dtype)
        if key not in self._known:
            self._known[key] = self._pages.copy(t)
        return self._known[key]


def _by_weight(model: nn.Module) -> list[list[PackedModule]]:
    """Return the packed layers, those that are tied side by side, without embeddings of which a token reads a row."""
    found: dict[int, list[PackedModule]] = {}
    for module in model.modules():
        if isinstance(module, PackedModule):
            found.setdefault(id(module.packed), []).append(module)
    return [modules for modules in found.values() if any(isinstance(module, PackedLinear) for module in modules)]


def _dense(model: nn.Module) -> list[nn.Parameter]:
    read = [module for module in model.modules() if not isinstance(module, nn.Embedding)]
    own = {id(p): p for module in read for p in module.parameters(recurse=False)}
    return [p for p in own.values() if type(p) is nn.Parameter and _movable(p)]


def _movable(t: Tensor) -> bool:
    return t.is_cpu and t.layout == torch.strided and t.is_contiguous() and not t.is_shared()
