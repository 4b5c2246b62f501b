"""Exchange compressed layers between the processes of a run, as they will be stored."""

from collections.abc import Mapping
from dataclasses import asdict

import torch
from torch import Tensor

from sparlow.model.artefact.bitmask import pack, unpack
from sparlow.model.artefact.dtypes import StoredDtypes
from sparlow.model.artefact.layers import SparseLowRankLinear, compressed_layers
from sparlow.model.forward.block_pass import BlockPass
from sparlow.model.forward.compressible import CompressibleWeight
from sparlow.report.records import LayerRecord

StoredTensors = tuple[Tensor, Tensor, Tensor, Tensor]  # values, mask, U and V, see ``bitmask``


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
    told = processes.all_gather({name: [asdict(found[name]), len(parts[0])] for name, parts in own.items()})
    records = {}
    for name, weight in weights.items():
        data, kept = told[who[name]][name]
        record = records[name] = LayerRecord.from_dict(data)
        stored = storage.of_layer(through.layer_name(name))
        parts = own.get(name) or _empty(weight, kept, record.rank, stored)
        for part in parts:
            if part.numel():
                processes.broadcast(part.view(torch.uint8), who[name])
        if name not in own:
            values, mask, U, V = parts
            S = unpack(values, mask, record.shape)
            weight.put(SparseLowRankLinear(S.to(weight.dtype), U.to(weight.dtype), V.to(weight.dtype), weight.bias))
    return records


def _as_stored(layer: SparseLowRankLinear, stored: torch.dtype) -> StoredTensors:
    """Return the parts of a compressed layer, as its shard will hold them."""
    values, mask = pack(layer.S.detach().to(stored))
    return values, mask, layer.U.detach().to(stored).contiguous(), layer.V.detach().to(stored).contiguous()


def _empty(weight: CompressibleWeight, kept: int, rank: int, stored: torch.dtype) -> StoredTensors:
    """Return uninitialised tensors of the shapes that ``_as_stored`` gives for the layer of ``weight``."""
    rows, columns = weight.shape
    mask = torch.empty(rows, -(-columns // 8), dtype=torch.uint8, device=weight.device)
    shapes = ((kept,), (rows, rank), (rank, columns))
    values, U, V = (torch.empty(shape, dtype=stored, device=weight.device) for shape in shapes)
    return values, mask, U, V
