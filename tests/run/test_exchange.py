"""Layers that another process has compressed arrive as its shard will hold them."""

import json
from types import SimpleNamespace

import pytest
import torch

from coded import coded_layer
from sparlow.model.artefact.dtypes import StoredDtypes
from sparlow.model.artefact.layers import compressed_layers
from sparlow.model.artefact.packing import packed_state
from sparlow.model.forward.compressible import compressible
from sparlow.report.records import LayerRecord
from sparlow.run.exchange import exchange_layers

SHAPES = {"up": (24, 20), "down": (20, 24)}


class Wire:
    """What the first of two processes sends, and then what the second receives."""

    def __init__(self):
        self.told, self.sent, self.receiving = None, [], False

    def all_gather(self, value):
        self.told = self.told or json.dumps(value)
        return [json.loads(self.told), {}]

    def broadcast(self, tensor, source):
        assert source == 0
        if self.receiving:
            tensor.copy_(self.sent.pop(0))
        else:
            self.sent.append(tensor.clone())


def dense_block(dtype):
    linears = {name: torch.nn.Linear(*shape[::-1]) for name, shape in SHAPES.items()}
    return torch.nn.ModuleDict(linears).to(dtype)


def record(name):
    return LayerRecord(
        block=0,
        name=name,
        shape=SHAPES[name],
        pattern="2:4",
        density=0.5,
        rank=3,
        relative_error=0.1,
        relative_error_per_token=0.1,
        iterations=1,
        seconds=1.0,
        damping=0.0,
    )


@pytest.mark.parametrize("computing", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", ["dense", "2:4", "free"])
@pytest.mark.parametrize("values", ["model", "int8", "int3"])
def test_what_arrives_is_the_same_to_the_bit_and_is_packed_to_the_same_bytes(values, pattern, computing):
    storage, wire = StoredDtypes(torch.bfloat16, {}), Wire()
    first, second = dense_block(computing), dense_block(computing)
    second.load_state_dict(first.state_dict())
    weights = [compressible(block) for block in (first, second)]
    for name, weight in weights[0].items():
        layer = coded_layer(SHAPES[name], "int4" if values == "model" else values, pattern=pattern, bias=weight.bias)
        form = None if values == "model" else layer.stored
        layer = layer.to(computing)
        layer.stored = form
        weight.put(layer)
    who = dict.fromkeys(SHAPES, 0)
    records = {name: record(name) for name in SHAPES}
    for block, mine, found in zip((first, second), weights, (records, {}), strict=True):
        through = SimpleNamespace(processes=wire, block=block, layer_name=lambda name: f"h.0.{name}")
        assert exchange_layers(through, mine, found, who, storage) == records
        wire.receiving = True
    assert not wire.sent
    for name, layer in compressed_layers(first).items():
        other = compressed_layers(second)[name]
        assert all(torch.equal(p, q) for p, q in zip(layer.parameters(), other.parameters(), strict=True))
        assert layer.S.dtype == other.S.dtype == computing
    one, other = (packed_state(block, wanted=storage.of_layer, keep=True)[0] for block in (first, second))
    assert one.keys() == other.keys()
    assert all(torch.equal(t, other[name]) for name, t in one.items())
    assert ("up.scale" in one) == (values != "model")
