"""What a block is called with: tensors in containers of any kind, looked into and taken apart.

Tuples, lists and dicts, named tuples, dataclasses, transformers' outputs and caches, a ``UserDict``: whatever holds
values as items or as attributes is walked through; modules, configurations, functions and classes are left alone.
"""

import copy
import enum
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

_OPAQUE = (
    *(str, bytes, int, float, complex, type(None), type, enum.Enum, types.ModuleType),
    *(types.FunctionType, types.BuiltinFunctionType, types.MethodType, nn.Module, PreTrainedConfig),
    *(torch.dtype, torch.device, torch.Size, torch.Generator),
)

Way = tuple[Any, ...]  # the keys, indices and names that lead to something inside of a value
Kinds = type | tuple[type, ...]


def tensors_in(value: Any) -> Iterator[Tensor]:  # noqa: ANN401 - arguments of a foreign forward
    """Yield the tensors in an argument, those in containers included."""
    return (leaf for _, leaf in leaves(value) if isinstance(leaf, Tensor))


def leaves(value: Any, kinds: Kinds = Tensor, without: frozenset[int] = frozenset()) -> Iterator[tuple[Way, Any]]:  # noqa: ANN401
    """Yield everything in an argument that is no container, with the way to it.

    Args:
        value: The argument.
        kinds: What is not looked into; in the order in which ``rebuilt`` replaces it.
        without: Ids of containers that are passed over.
    """
    return _leaves(value, kinds, (), set(without))


def _leaves(value: Any, kinds: Kinds, way: Way, seen: set[int]) -> Iterator[tuple[Way, Any]]:  # noqa: ANN401
    if isinstance(value, kinds) or not _is_container(value):
        yield way, value
        return
    if id(value) in seen:
        return
    if not isinstance(value, tuple):
        seen.add(id(value))
    for key, part in parts(value).items():
        yield from _leaves(part, kinds, (*way, key), seen)


def rebuilt(
    value: Any,  # noqa: ANN401 - as above
    leaf: Callable[[Any], Any],
    kinds: Kinds = Tensor,
    made: dict[int, Any] | None = None,
) -> Any:  # noqa: ANN401 - as above
    """Return an argument in containers of its own, with other things in the place of its tensors.

    Args:
        value: The argument.
        leaf: Gives what takes the place of a tensor.
        kinds: What it is asked for.
        made: By the id of a container what takes its place; all that are made are added.
    """
    made = {} if made is None else made
    if isinstance(value, kinds):
        return leaf(value)
    if not _is_container(value):
        return value
    if id(value) in made:
        return made[id(value)]
    if isinstance(value, tuple):
        fresh = [rebuilt(part, leaf, kinds, made) for part in value]
        return type(value)(*fresh) if hasattr(value, "_fields") else type(value)(fresh)
    new = made[id(value)] = copy.copy(value)
    for (kind, key), part in parts(value).items():
        inner = rebuilt(part, leaf, kinds, made)
        if kind == "attribute":
            object.__setattr__(new, key, inner)
        elif isinstance(new, dict):
            dict.__setitem__(new, key, inner)
        else:
            list.__setitem__(new, key, inner)
    return new


def containers_in(value: Any) -> list[Any]:  # noqa: ANN401 - as above
    """Return the containers in an argument that can be written to, each once."""
    found: dict[int, Any] = {}

    def look(part: Any) -> None:  # noqa: ANN401 - as above
        if _is_container(part) and id(part) not in found:
            if not isinstance(part, tuple):
                found[id(part)] = part
            for inner in parts(part).values():
                look(inner)

    look(value)
    return list(found.values())


def _is_container(value: object) -> bool:
    if isinstance(value, (Tensor, *_OPAQUE)):
        return False
    return isinstance(value, tuple | list | dict) or hasattr(value, "__dict__") or hasattr(type(value), "__slots__")


def parts(value: Any) -> dict[tuple[str, Any], Any]:  # noqa: ANN401 - any container
    """Return what a container holds itself, by key, index or name."""
    if isinstance(value, tuple):
        return {("item", i): part for i, part in enumerate(value)}
    items: dict[tuple[str, Any], Any] = {}
    if isinstance(value, dict):
        items = {("item", key): part for key, part in value.items()}
    elif isinstance(value, list):
        items = {("item", i): part for i, part in enumerate(value)}
    names = [name for kind in type(value).__mro__ for name in _slots(kind) if hasattr(value, name)]
    own = vars(value) if hasattr(value, "__dict__") else {}
    found = {name: getattr(value, name) for name in names} | own
    return items | {("attribute", name): part for name, part in found.items()}


def _slots(kind: type) -> tuple[str, ...]:
    names = vars(kind).get("__slots__", ())
    names = (names,) if isinstance(names, str) else tuple(names)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))
