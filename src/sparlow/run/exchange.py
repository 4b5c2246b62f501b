"""Exchange compressed layers between the processes of a run, as they will be stored."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from sparlow.linalg.grid import WHOLE_ROW, make_grid
from sparlow.model.artefact.dtypes import StoredDtypes
from sparlow.model.artefact.layers import SparseLowRankLinear, compressed_layers
from sparlow.model.artefact.stored_form import Weight, pack_weight, unpack_weight
from sparlow.model.forward.block_pass import BlockPass
from sparlow.model.forward.compressible import CompressibleWeight
from sparlow.report.records import LayerRecord

StoredTensors = dict[str, Tensor]  # by the last part of their names, see ``stored_form``


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
    told = processes.all_gather({name: [asdict(found[name]), _sizes(parts)] for name, parts in own.items()})
    records = {}
    for name, weight in weights.items():
        data, sizes = told[who[name]][name]
        record = records[name] = LayerRecord.from_dict(data)
        stored = storage.of_layer(through.layer_name(name))
        parts = own.get(name) or _empty(sizes, weight.device)
        for part in parts.values():
            if part.numel():
                processes.broadcast(part.view(torch.uint8), who[name])
        if name not in own:
            _put(weight, parts, record, stored)
    return records


def _put(weight: CompressibleWeight, parts: StoredTensors, record: LayerRecord, stored: torch.dtype) -> None:
    """Replace a dense weight by what another process made of it."""
    grid = make_grid(record.value_type, record.levels or "auto", record.group or WHOLE_ROW)
    found, form = unpack_weight(parts, record.shape, grid if "scale" in parts else None, stored)
    S, U, V = (part.to(weight.dtype) for part in found)
    layer = SparseLowRankLinear(S, U, V, weight.bias)
    layer.stored = form
    weight.put(layer)


def _as_stored(layer: SparseLowRankLinear, stored: torch.dtype) -> StoredTensors:
    """Return the parts of a compressed layer, as its shard will hold them."""
    weight = Weight(*(part.detach().to(stored) for part in (layer.S, layer.U, layer.V)))
    tensors = pack_weight(weight, layer.stored, stored).tensors
    return {name: part.to(layer.S.device).contiguous() for name, part in tensors.items()}


def _sizes(parts: StoredTensors) -> dict[str, list[Any]]:
    """Return the type and the shape of each part, as JSON holds them."""
    return {name: [str(part.dtype).removeprefix("torch."), *part.shape] for name, part in parts.items()}


def _empty(sizes: Mapping[str, Sequence[Any]], device: torch.device) -> StoredTensors:
    """Return uninitialised tensors of these types and shapes."""
    return {
        name: torch.empty(shape, dtype=getattr(torch, dtype), device=device) for name, (dtype, *shape) in sizes.items()
    }
