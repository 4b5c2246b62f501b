import pytest
import torch

from families import EXTRAS, FAMILIES, save_tiny, tiny
from sparlow.errors import InputError
from sparlow.linalg.gram import SquareAccumulator
from sparlow.model.forward.block_pass import BlockPass
from sparlow.model.forward.call_order import observe_dependences
from sparlow.model.forward.capture import capture_block_inputs
from sparlow.model.forward.compressible import experts_apart
from sparlow.model.forward.decoder import Decoder
from sparlow.model.forward.input_statistics import collect_statistics
from sparlow.model.loading.meta import inputs_of, meta_model
from sparlow.model.loading.source import place_of_converted


@pytest.mark.parametrize("family", [*FAMILIES, *EXTRAS])
def test_the_meta_model_has_the_shapes_of_the_model(family, tmp_path):
    model = save_tiny(family, tmp_path, dtype=torch.bfloat16)
    found = meta_model(str(tmp_path))
    shapes = {name: (p.shape, p.dtype) for name, p in model.named_parameters()}
    assert {name: (p.shape, p.dtype) for name, p in found.named_parameters()} == shapes
    assert all(p.is_meta for p in found.parameters())
    assert found.all_tied_weights_keys == model.all_tied_weights_keys


@pytest.mark.transformers
@pytest.mark.parametrize("family", [*FAMILIES, *EXTRAS])
def test_who_reads_what_is_seen_without_weights(family, tmp_path):
    model = save_tiny(family, tmp_path)
    blocks = Decoder.of(model).blocks
    recording = capture_block_inputs(model, torch.arange(24).view(2, 12), micro_batch=2)
    through = BlockPass(blocks[0], recording.calls[0], recording.hidden)
    experts_apart(through.block, through.weights)
    found = collect_statistics(through, SquareAccumulator)
    order = observe_dependences(through, through.weights).stages(through.weights)
    for told in (inputs_of(meta_model(str(tmp_path)))[0], inputs_of(model)[0]):
        assert told.owners == found.owner
        assert told.dependences.stages(through.weights) == order


def test_where_nothing_runs_every_layer_stands_by_itself(monkeypatch):
    model = tiny("llama")
    monkeypatch.setattr(type(model), "forward", lambda *_, **__: 1 / 0)
    for told in inputs_of(model):
        assert all(name == owner for name, owner in told.owners.items())
        assert [stage.names for stage in told.dependences.stages(told.owners)[0]] == [tuple(told.owners)]


def test_a_type_can_be_asked_for(tmp_path):
    save_tiny("llama", tmp_path, dtype=torch.bfloat16)
    assert meta_model(str(tmp_path), dtype="float16").dtype == torch.float16
    with pytest.raises(InputError, match="float31"):
        meta_model(str(tmp_path), dtype="float31")


def test_the_config_of_a_gguf_file_that_is_converted_is_read_instead_of_its_header(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARLOW_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tiny.gguf").write_bytes(b"no header")
    with pytest.raises(InputError, match="Cannot read the header"):
        meta_model(str(tmp_path / "tiny.gguf"))
    model = save_tiny("llama", place_of_converted(tmp_path / "tiny.gguf"), dtype=torch.float16)
    found = meta_model(str(tmp_path / "tiny.gguf"))
    assert {name: p.shape for name, p in found.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert found.dtype == torch.float16


@pytest.mark.parametrize("name", ["/no/such/model", "./no.gguf", "nobody/nothing"])
def test_a_model_that_is_not_there(name):
    with pytest.raises(InputError):
        meta_model(name)
