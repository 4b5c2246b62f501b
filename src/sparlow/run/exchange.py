"""Exchange compressed layers between the processes of a run, as they will be stored."""

from collections.abc import Mapping
from dataclasses import asdict, astuple, replace

import torch
from torch import Tensor

from sparlow.linalg.grid import Grid
from sparlow.model.artefact.dtypes import StoredDtypes
from sparlow.model.artefact.layers import SparseLowRankLinear, compressed_layers
from sparlow.model.artefact.stored_form import PackedWeight, Weight, pack_weight, unpack_weight
from sparlow.model.forward.block_pass import BlockPass
from sparlow.model.forward.compressible import CompressibleWeight
from sparlow.report.records import LayerRecord


def exchange_layers(
    through: BlockPass,
    weights: Mapping[str, CompressibleWeight],
    found: Mapping[str, LayerRecord],
    who: Mapping[str, int],
    storage: StoredDtypes,
) -> dict[str, LayerRecord]:
    """Replace the layers that other processes have compressed, too; return all records.

    Args:
        through: The block, in which this process has replaced its own layers.
        weights: All dense weights that are compressed, by name.
        found: The records of this process.
        who: The process that compressed each.
        storage: The types of the result.
    """
    processes, layers = through.processes, compressed_layers(through.block)
    own = {name: _as_stored(layers[name], storage.of_layer(through.layer_name(name))) for name in found}
    told = processes.all_gather({name: [asdict(found[name]), *_told(packed)] for name, packed in own.items()})
    records = {}
    for name, weight in weights.items():
        data, shapes, grid, dtype = told[who[name]][name]
        record = records[name] = LayerRecord.from_dict(data)
        tensors = own[name].tensors if name in own else _empty(shapes, weight.device)
        for part in shapes:
            if tensors[part].numel():
                processes.broadcast(tensors[part].view(torch.uint8), who[name])
        if name not in own:
            parts, form = unpack_weight(tensors, record.shape, grid and Grid(*grid), _type(dtype))
            S, U, V = (part.to(weight.dtype) for part in parts)
            layer = SparseLowRankLinear(S, U, V, weight.bias)
            layer.stored = form
            weight.put(layer)
    return records


def _as_stored(layer: SparseLowRankLinear, stored: torch.dtype) -> PackedWeight:
    """Return a compressed layer as its shard will hold it, on the device of the layer."""
    packed = pack_weight(Weight(layer.S, layer.U, layer.V), layer.stored, stored)
    floats = [] if packed.grid else ["weight"]
    floats += [] if packed.int8_factors else ["U", "V"]
    tensors = {part: t.to(layer.S.device, stored if part in floats else None) for part, t in packed.tensors.items()}
    return replace(packed, tensors={part: t.contiguous() for part, t in tensors.items()})


def _told(packed: PackedWeight) -> list[object]:
    """Return what another process must know of a packed weight before its tensors come, as JSON can say it."""
    shapes = {part: [str(t.dtype), list(t.shape)] for part, t in packed.tensors.items()}
    return [shapes, packed.grid and astuple(packed.grid), str(packed.dtype)]


def _empty(shapes: Mapping[str, tuple[str, list[int]]], device: torch.device) -> dict[str, Tensor]:
    """Return uninitialised tensors for what another process will send."""
    return {part: torch.empty(size, dtype=_type(dtype), device=device) for part, (dtype, size) in shapes.items()}


def _type(name: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, name.removeprefix("torch."))
    return found
