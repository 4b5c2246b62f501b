"""A module's state dict as it is stored: each packed weight's tensors in place of S or of a quantised embedding."""

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparlow.errors import InputError
from sparlow.model.artefact.layers import SparseLowRankLinear
from sparlow.model.artefact.schemes import INT8, Scheme, StoredLayer, name_of, stored_pattern
from sparlow.model.artefact.stored_form import PackedWeight, StoredForm, Weight, pack_weight

Types = Callable[[str], torch.dtype]


def stored_form(module: nn.Module) -> StoredForm | None:
    """Return how a module's weight is to be packed, if it is not in floats."""
    found = vars(module).get("stored")
    return found if isinstance(found, StoredForm) else None


def pack_module(module: nn.Module, wanted: torch.dtype | None = None) -> PackedWeight | None:
    """Return the weight of a compressed layer or of a quantised embedding as it is stored; None of anything else.

    Args:
        module: Itself, without what is inside of it.
        wanted: The type it is stored in; its own if left out.
    """
    form = stored_form(module)
    if isinstance(module, SparseLowRankLinear):
        return pack_weight(Weight(module.S, module.U, module.V), form, wanted)
    if form is None:
        return None
    W: Tensor = module.weight  # type: ignore[assignment]  # which what is quantised has
    return pack_weight(Weight(W, W.new_zeros(len(W), 0), W.new_zeros(0, W.shape[1])), form, wanted)


def packed_state(
    root: nn.Module,
    *,
    without: str | None = None,
    wanted: Types | None = None,
    keep: bool = False,
    told: list[str] | None = None,
) -> tuple[dict[str, Tensor], dict[str, PackedWeight]]:
    """Return the state dict of a module as it is stored, and what of it is packed, by the name of the layer.

    Kept values lie flat, so that a loader that expects a matrix under this name stops instead of making one up. What is
    tied to a quantised embedding is in the first dict once, and in the second by every name.

    Args:
        root: The module.
        without: Name of a submodule whose tensors are left out.
        wanted: Says the type that a layer of a name is stored in; its own if left out.
        keep: Refuse what does not lie on its grid any more; else it is stored in floats, with a warning.
        told: Takes the names of such layers in place of the warning, for whoever packs one part after the other.

    Raises:
        InputError: Weights are off-loaded, or refused.
    """
    state = {k: t for k, t in root.state_dict().items() if without is None or not k.startswith(f"{without}.")}
    ties, packs = _ties(root), dict[str, PackedWeight]()
    lost: list[str] = [] if told is None else told
    for name, module in root.named_modules():
        own = f"{name}.S" if isinstance(module, SparseLowRankLinear) else f"{name}.weight"
        if own not in state or name in ties:
            continue
        if stored_form(module) is None and not isinstance(module, SparseLowRankLinear):
            continue
        if state[own].is_meta:
            raise InputError(f"{name} is off-loaded. Open the model without off-loading to save it.")
        packed = pack_module(module, wanted(name) if wanted else None)
        if packed is None or packed.lost:
            lost.append(name)
        if packed is None or (packed.grid is None and own.endswith(".weight")):
            continue  # an embedding that is dense again
        packs[name] = packed
        del state[own]
        state |= {f"{name}.{part}": tensor.cpu() for part, tensor in packed.tensors.items()}
    if told is None:
        tell_lost(lost, keep=keep)
    for name, other in ties.items():
        if other in packs and f"{name}.weight" in state:
            del state[f"{name}.weight"]
            packs[name] = packs[other]
    return state, packs


def packed_weights(root: nn.Module) -> Iterator[tuple[str, PackedWeight]]:
    """Yield what ``packed_state`` packs, by name, one after the other; what is tied has the tensors of the other."""
    ties = _ties(root)
    for name, module in root.named_modules():
        packed = None if name in ties else pack_module(module)
        if packed is not None and (packed.grid or isinstance(module, SparseLowRankLinear)):
            yield name, packed
            yield from ((alias, packed) for alias, other in ties.items() if other == name)


def _ties(root: nn.Module) -> dict[str, str]:
    """Return the layers whose weight the model's class ties to that of a quantised one, and which that is."""
    tied: Mapping[str, str] = getattr(root, "all_tied_weights_keys", None) or {}
    found = {}
    for target, source in tied.items():
        (one, _, part), (other, _, same) = target.rpartition("."), source.rpartition(".")
        modules: list[Any] = [root.get_submodule(one), root.get_submodule(other)] if part == same == "weight" else []
        if modules and stored_form(modules[1]) and modules[0].weight is modules[1].weight:
            found[one] = other
    return found


def tell_lost(names: Collection[str], *, keep: bool = False) -> None:
    """Warn once of layers that are stored in floats because they are not on their grid any more.

    Raises:
        InputError: They were to be kept on it.
    """
    if not names:
        return
    first = next(iter(names))
    others = f" and {len(names) - 1} more" if len(names) > 1 else ""
    what = f"{first}{others}: the numbers are not on the grid that they were compressed to, as after training"
    if keep:
        raise InputError(f"{what}. Compress again, or train on the grid.")
    warnings.warn(f"{what}. They are stored in the model's own type.", stacklevel=3)


def stored_layer(
    name: str,
    state: Mapping[str, Tensor],
    packed: PackedWeight,
    pattern: str | None = None,
    *,
    transposed: bool = False,
) -> StoredLayer:
    """Return how a packed weight is stored.

    Args:
        name: Of the layer; one tied to another has that one's tensors.
        state: The tensors as they are written, whose float types may be narrower than in memory.
        packed: It.
        pattern: That it obeys, if known.
        transposed: Whether the model's class stores the weight as (in, out).
    """
    U, V = packed.tensors["U"], packed.tensors["V"]
    weight, factor = (state.get(f"{name}.{part}", packed.tensors[part]).dtype for part in ("weight", "U"))
    scheme = Scheme(
        stored_pattern((len(U), V.shape[1]), packed.kept, pattern),
        packed.grid.name if packed.grid else name_of(weight),
        len(V),
        INT8 if packed.int8_factors else name_of(factor),
        transposed,
        packed.grid,
        name_of(packed.dtype) if packed.grid or packed.int8_factors else None,
    )
    return StoredLayer(scheme, packed.kept)
