import functools
import hashlib
import json
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.core_model_loading import MergeModulelist
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1PreTrainedModel

import sparlow
from families import EXTRAS, FAMILIES, save_tiny, tiny, tiny_tokenizer
from samples import few_of
from sparlow import machine
from sparlow.errors import is_out_of_memory
from sparlow.evaluation.perplexity import evaluate, perplexity
from sparlow.model.forward import activation_store
from sparlow.model.forward.activation_store import ActivationStore, place
from sparlow.model.forward.decoder import Decoder
from sparlow.model.loading import streaming
from sparlow.model.loading.source import OpenedModel, open_model, upcast_for_cpu
from sparlow.model.loading.weights import all_loaded, scan
from sparlow.progress import Clock
from sparlow.recipe.recipe import Recipe
from sparlow.run import compress as compression
from sparlow.run.passes import BlockwiseRunner

CPU = torch.device("cpu")
QUICK = Recipe(rank=4, options={"effort": 0.1, "max_steps": 5})
WINDOWS = torch.randint(2, 97, (6, 12), generator=torch.Generator().manual_seed(1))


def stored(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def same(found, expected):
    return found.dtype == expected.dtype and torch.equal(found, expected)


def by_blocks(opened, offload="auto", notify=lambda _: None):
    runner = BlockwiseRunner(opened, offload, Clock(), notify)
    return runner.measure("dense perplexity", WINDOWS, opened.weights).perplexity.value


def checksums(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.safetensors"))}


@pytest.mark.transformers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*FAMILIES, *EXTRAS])
def test_parts_are_those_of_the_whole_model(name, dtype, tmp_path):
    save_tiny(name, tmp_path, dtype=dtype)
    opened = open_model(str(tmp_path))
    expected = stored(upcast_for_cpu(opened.model))
    streamed = open_model(str(tmp_path), streamed=True)
    assert streamed.fingerprint == opened.fingerprint
    assert not streamed.warnings
    model, parts = streamed.model, streamed.on_disk
    blocks_name, blocks = Decoder.of(model).name, Decoder.of(model).blocks
    found = set()
    with parts.outside_blocks():
        for key, tensor in stored(model).items():
            if not key.startswith(f"{blocks_name}."):
                found.add(key)
                assert same(tensor, expected[key]), key
    for i in range(len(blocks)):
        with parts.block(i) as block:
            for key, tensor in stored(block).items():
                found.add(f"{blocks_name}.{i}.{key}")
                assert same(tensor, expected[f"{blocks_name}.{i}.{key}"]), key
    assert found == expected.keys()
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("name", few_of(["llama", "opt", "gemma3_text", "mixtral", "falcon_alibi"], "llama", "mixtral"))
def test_a_streamed_run_gives_the_bytes_of_one_in_memory(name, tmp_path, monkeypatch):
    save_tiny(name, tmp_path / "dense", dtype=torch.bfloat16)
    options = {"calibration": WINDOWS, "evaluate": ()}
    streamed = sparlow.compress(tmp_path / "dense", QUICK, out=tmp_path / "streamed", **options)
    opening = compression.open_dense
    monkeypatch.setattr(compression, "open_dense", lambda *a, **k: opening(*a, **{**k, "streamed": False}))
    whole_run = sparlow.compress(tmp_path / "dense", QUICK, out=tmp_path / "whole", offload="disk", **options)
    assert checksums(tmp_path / "streamed") == checksums(tmp_path / "whole")
    assert streamed.bytes == whole_run.bytes
    assert streamed.not_compressed == whole_run.not_compressed


@pytest.mark.parametrize("name", ["llama", "opt", "gemma2", "granite", "bloom", "mixtral"])
def test_perplexity_by_blocks_is_that_of_the_model(name, tmp_path):
    model = save_tiny(name, tmp_path)
    expected = perplexity(model, WINDOWS).value
    seen = []
    found = by_blocks(OpenedModel(model, None, name, ""), notify=seen.append)
    assert found == pytest.approx(expected, rel=1e-5)
    assert [step.done for step in seen] == list(range(1, len(Decoder.of(model).blocks) + 2))
    assert by_blocks(open_model(str(tmp_path), streamed=True), offload="disk") == found


def test_logits_are_taken_a_few_at_a_time(tmp_path, monkeypatch):
    model = save_tiny("gemma2", tmp_path)
    opened = OpenedModel(model, None, "tiny", "")
    expected = by_blocks(opened)
    shapes = []
    model.lm_head.register_forward_hook(lambda *args: shapes.append(args[-1].numel()))
    monkeypatch.setattr("sparlow.model.forward.capture.LOGITS_AT_ONCE", 3000)
    assert by_blocks(opened) == pytest.approx(expected, rel=1e-6)
    assert max(shapes) <= 3000


def test_tied_weights_stay_tied(tmp_path):
    save_tiny("gemma2", tmp_path)
    streamed = open_model(str(tmp_path), streamed=True)
    model = streamed.model
    for _ in range(2):
        assert model.lm_head.weight is model.model.embed_tokens.weight
        with streamed.on_disk.outside_blocks():
            assert model.lm_head.weight is model.model.embed_tokens.weight
            assert not model.lm_head.weight.is_meta


def test_an_embedding_that_is_stored_twice_is_tied_as_transformers_does(tmp_path):
    save_tiny("gemma2", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert open_model(str(tmp_path), streamed=True).fingerprint == open_model(str(tmp_path)).fingerprint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_buffers_that_a_module_around_them_computes_are_not_whatever_lay_in_memory(dtype, tmp_path):
    save_tiny("falcon_h1", tmp_path, dtype=dtype)
    whole = open_model(str(tmp_path)).model
    streamed = open_model(str(tmp_path), streamed=True)
    assert not streamed.warnings
    expected = dict(whole.named_non_persistent_buffers())
    found = dict(streamed.model.named_non_persistent_buffers())
    assert found.keys() == expected.keys()
    assert any("mup_vector" in name for name in found)
    for name, buffer in found.items():
        assert torch.equal(buffer, expected[name]), name
    if dtype == torch.float32:
        recipe = Recipe(algorithm="wanda", pattern="2:4")
        report = sparlow.compress(
            tmp_path, recipe, calibration=WINDOWS, out=tmp_path / "out", evaluate=("builtin",), limit=2
        )
        plain = evaluate(whole, tiny_tokenizer(), evaluate=("builtin",), seqlen=WINDOWS.shape[1], limit=2)
        assert report.dense["perplexity"]["builtin"] == pytest.approx(plain["perplexity"]["builtin"], rel=1e-6)


def test_a_model_with_a_buffer_that_nothing_initialises_is_not_streamed(tmp_path, monkeypatch):
    save_tiny("falcon_h1", tmp_path)
    plain = PreTrainedModel._init_weights
    monkeypatch.setattr(FalconH1PreTrainedModel, "_init_weights", functools.partialmethod(plain))
    opened = open_model(str(tmp_path), streamed=True)
    assert opened.on_disk is None
    said = "The whole model was held in memory, because nothing initialises the buffer model.layers.0.mamba.mup_vector."
    assert opened.warnings == (said,)


def test_several_files_are_read(tmp_path):
    model = tiny("llama")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    streamed = open_model(str(tmp_path), streamed=True)
    with all_loaded(streamed.on_disk, 3), torch.no_grad():
        assert torch.equal(streamed.model(WINDOWS).logits, model(WINDOWS).logits)


def test_a_model_that_cannot_be_streamed_is_held_whole_and_that_is_said(tmp_path):
    save_tiny("llama", tmp_path / "dense")
    (tmp_path / "dense" / "model.safetensors").rename(tmp_path / "dense" / "other.safetensors")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config | {"transformers_weights": "other.safetensors"}))
    report = sparlow.compress(tmp_path / "dense", QUICK, calibration=WINDOWS, evaluate=(), out=tmp_path / "out")
    assert [w for w in report.warnings if "The whole model was held in memory, because" in w]


@pytest.mark.parametrize("streamed", [False, True])
def test_memory_that_runs_out_as_experts_are_put_together_is_not_taken_for_a_fault_of_the_file(
    streamed, tmp_path, monkeypatch
):
    """Neither is the model opened whole instead, which would take more."""
    save_tiny("mixtral", tmp_path)

    def full(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")

    with monkeypatch.context() as patch:
        patch.setattr(MergeModulelist, "convert", full)
        with pytest.raises(RuntimeError) as stop:
            open_model(str(tmp_path), streamed=streamed)
        assert is_out_of_memory(stop.value)
    assert open_model(str(tmp_path), streamed=streamed).fingerprint


def test_a_thread_that_reads_ahead_may_fail_or_not_begin(tmp_path, monkeypatch, recwarn):
    save_tiny("llama", tmp_path)
    opened = open_model(str(tmp_path), streamed=True)

    def full(*_, **__):
        raise failure

    for name, error in (("_read_all", MemoryError()), ("Thread", RuntimeError("can't start new thread"))):
        with monkeypatch.context() as patch:
            failure = error
            patch.setattr(streaming, name, full)
            with opened.weights.block(0) as block:
                assert not any(p.is_meta for p in block.parameters())
            for thread in threading.enumerate():
                if thread is not threading.current_thread():
                    thread.join(5)
    assert not recwarn.list  # as pytest would have of an exception in a thread


def test_damaged_tensors_are_named():
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    assert scan([model.state_dict(keep_vars=True)]).damaged == {"model.layers.1.mlp.up_proj.weight"}


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_a_shelf_gives_back_what_it_was_given(where):
    tensors = [torch.randn(2, 3), torch.randn(4, 3).bfloat16(), torch.randn(3, 1).T]
    store = ActivationStore(where, tensors)
    assert len(store) == 3
    for _ in range(2):
        assert all(map(torch.equal, store, tensors))
    assert torch.equal(store[-1], tensors[-1])
    assert [len(x) for x in store[:2]] == [2, 4]
    assert len(store.fresh()) == 0
    assert store.fresh().place == where
    with pytest.raises(IndexError):
        store[3]


def test_what_is_too_large_for_memory_goes_to_disk():
    assert place("auto", 1000, CPU) == "cpu"
    assert place("auto", 10**18, CPU) == "disk"
    assert place("disk", 1000, CPU) == "disk"


def test_auto_asks_for_what_this_process_may_take_not_for_what_the_machine_has(monkeypatch):
    assert place("auto", 1000, CPU) == "cpu"
    monkeypatch.setattr(machine, "_limits", lambda: iter([8 * 1000]))  # of a control group, say
    assert place("auto", 999, CPU) == "cpu"
    assert place("auto", 1000, CPU) == "disk"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert place("auto", 999, CPU) == "disk"


def test_hidden_states_leave_main_memory_to_a_training_unless_files_would_lie_there(monkeypatch):
    monkeypatch.setattr(activation_store, "lies_in_memory", lambda _: False)
    assert place("auto", 1000, CPU, trained=True) == "disk"
    assert place("cpu", 1000, CPU, trained=True) == "cpu"
    monkeypatch.setattr(activation_store, "lies_in_memory", lambda _: True)
    assert place("auto", 1000, CPU, trained=True) == "cpu"


def test_there_is_no_other_place():
    with pytest.raises(sparlow.errors.InputError, match=r"cannot be kept in 'attic'\. Give --offload auto, cpu, disk"):
        place("attic", 1000, CPU)
