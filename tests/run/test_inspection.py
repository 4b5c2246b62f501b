"""What is shown of a directory: a line a layer, and one for many that differ in a number only."""

import pytest

from sparlow.model.artefact.describe import LayerInfo
from sparlow.run.inspection import MANY, Inspection


def inspection(layers):
    patterns = {layer.name: "2:4" for layer in layers if not layer.name.endswith(".3")}
    nothing = dict.fromkeys(("bytes", "linear_bytes", "values", "weights"), 0)
    shares = dict.fromkeys(("bits_per_weight", "bits_per_parameter", "share_compressed"), 0.0)
    return Inspection("out", tuple(layers), patterns, **nothing, **shares)


def experts(block, count, part="down_proj", shape=(48, 32)):
    return [
        LayerInfo(f"model.layers.{block}.mlp.experts.{part}.{i}", shape, 10, i / 100, i % 3, 1000, "int4")
        for i in range(count)
    ]


def test_experts_of_a_block_share_a_line_and_every_one_has_its_own_when_asked():
    q = LayerInfo("model.layers.0.self_attn.q_proj", (32, 32), 512, 0.5, 4, 700, "int4")
    found = inspection([q, *experts(0, 128), *experts(0, 128, "gate_up_proj", (96, 48)), *experts(1, 128)])
    lines = found.lines(every=False)
    assert [line.layer for line in lines] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.experts.down_proj.* (128)",
        "model.layers.0.mlp.experts.gate_up_proj.* (128)",
        "model.layers.1.mlp.experts.down_proj.* (128)",
    ]
    assert lines[1] == (lines[1].layer, "48 × 32", "2:4, –", "int4", "0.6350", "0 to 2", "128,000")
    assert lines[0] == (q.name, "32 × 32", "2:4", "int4", "0.5000", "4", "700")
    every = found.lines(every=True)
    assert [line.layer for line in every] == [layer.name for layer in found.layers]
    assert every[4] == ("model.layers.0.mlp.experts.down_proj.3", "48 × 32", "–", "int4", "0.0300", "0", "1,000")


@pytest.mark.parametrize("count", [MANY - 1, MANY])
def test_few_layers_have_a_line_each(count):
    assert len(inspection(experts(0, count)).lines(every=False)) == (count if count < MANY else 1)


def test_an_embedding_and_a_head_stand_for_themselves():
    outside = [LayerInfo(name, (64, 32), 1, 1.0, 0, 1, "int8", outside=True) for name in ("wte", "lm_head")]
    assert [line.layer for line in inspection(outside).lines(every=False)] == ["wte", "lm_head"]
