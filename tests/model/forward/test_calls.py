"""What blocks are given beside their hidden state: each micro-batch's own, and what blocks write for later ones."""

import copy
from collections import UserDict
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import nn
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutput

from families import BY_TEXT, tiny
from sparlow.errors import InputError
from sparlow.evaluation.perplexity import perplexity
from sparlow.model.forward.activation_store import ActivationStore
from sparlow.model.forward.arguments import containers_in, leaves, rebuilt, tensors_in
from sparlow.model.forward.block_pass import BlockPass, run_block
from sparlow.model.forward.calls import CallRecorder
from sparlow.model.forward.capture import capture_block_inputs
from sparlow.model.forward.chain_check import require_chain
from sparlow.model.forward.compressible import compressible
from sparlow.model.forward.decoder import Decoder
from sparlow.model.forward.input_statistics import collect_statistics
from sparlow.model.loading.source import OpenedModel
from sparlow.progress import Clock
from sparlow.run import passes

WINDOWS = torch.randint(2, 97, (6, 16), generator=torch.Generator().manual_seed(1))


class Products:
    """Σ x xᵀ in float64."""

    def __init__(self, features, _device):
        self.H = torch.zeros(features, features, dtype=torch.float64)

    def add(self, x):
        x = x.flatten(0, -2).double()
        self.H += x.T @ x


def statistics_of_one_pass(model):
    """Σ x xᵀ of every layer of every block, from one forward of the whole model."""
    found, handles = {}, []
    for name, weight in Decoder.of(model).layers():

        def note(_, args, kwargs, name=name):
            x = (*args, *kwargs.values())[0]
            found.setdefault(name, Products(x.shape[-1], None)).add(x)

        module = model.get_submodule(name)
        assert weight.shape[1] == module.weight.shape[1]
        handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
    with torch.no_grad():
        model(WINDOWS, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: products.H for name, products in found.items()}


@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("family", [*BY_TEXT, "llama"])
def test_three_micro_batches_see_what_one_pass_of_the_model_sees(family, place):
    model = tiny(family)
    decoder = Decoder.of(model)
    expected = statistics_of_one_pass(model)
    recording = capture_block_inputs(model, WINDOWS, micro_batch=2, place=place)
    hidden, seen = recording.hidden, set()
    assert len(hidden) == 3
    for i, block in enumerate(decoder.blocks):
        outputs = hidden.fresh()
        found = collect_statistics(BlockPass(block, recording.calls[i], hidden), Products, outputs)
        for name, owner in found.owner.items():
            seen.add(decoder.layer_name(i, name))
            torch.testing.assert_close(
                found.statistics[owner].H, expected[decoder.layer_name(i, name)], rtol=1e-5, atol=1e-5
            )
        hidden = outputs
    assert seen == expected.keys()


@pytest.mark.parametrize("micro_batch", [2, 4])
@pytest.mark.parametrize("family", BY_TEXT)
def test_perplexity_by_blocks_is_that_of_the_model(family, micro_batch, monkeypatch):
    monkeypatch.setattr(passes, "windows_at_once", lambda *_: micro_batch)
    opened = OpenedModel(model := tiny(family), None, family, "")
    runner = passes.BlockwiseRunner(opened, "auto", Clock(), lambda _: None)
    found = runner.measure("dense perplexity", WINDOWS, opened.weights).perplexity
    assert found.value == pytest.approx(perplexity(model, WINDOWS).value, rel=1e-5)


@pytest.mark.parametrize("family", BY_TEXT)
def test_what_depends_on_the_text_alone_is_seen_without_weights(family):
    model = tiny(family)
    recording = capture_block_inputs(model, WINDOWS, micro_batch=2)
    brought = require_chain(copy.deepcopy(model).to("meta"))
    assert brought.hidden == recording.hidden[0][0, 0].numel()
    beside = {  # numbers a token of what differs between two micro-batches of a size
        id(kept): recording.calls[0]._of_text[kept.number].numel() // 32
        for calls in recording.calls
        for _, kept in calls.notes[1].leaves()
        if type(kept).__name__ == "_OfText"
    }
    assert brought.beside == sum(beside.values()) > 0


def test_what_the_text_does_not_decide_is_kept_once():
    calls = capture_block_inputs(tiny("gemma3_text"), WINDOWS, micro_batch=2).calls
    assert len({id(note) for note in calls[0].notes}) == 1
    assert len(calls[0]._of_text) == 0


@dataclass(frozen=True)
class Record:
    x: torch.Tensor
    note: str = "kept"


class Slotted:
    __slots__ = ("x",)

    def __init__(self, x):
        self.x = x


class Named(NamedTuple):
    x: torch.Tensor
    y: list[torch.Tensor]


def containers(x):
    cache = DynamicCache()
    cache.update(x[None, None], x[None, None] + 1, 0)
    yield {"a": [x, (x, 3)], "b": None}
    yield UserDict(a=(x, x))
    yield Record(x)
    yield Slotted(x)
    yield Named(x, [x])
    yield BaseModelOutput(last_hidden_state=x, hidden_states=(x, x))
    yield cache


@pytest.mark.parametrize("i", range(7))
def test_every_kind_of_container_is_looked_into_and_rebuilt(i):
    x = torch.arange(6.0).view(2, 3)
    value = list(containers(x))[i]
    assert any(torch.equal(t, x) or torch.equal(t, x[None, None]) for t in tensors_in(value))
    assert len(containers_in(value)) > 0
    twice = rebuilt(value, lambda t: 2 * t)
    assert type(twice) is type(value)
    assert [way for way, _ in leaves(twice)] == [way for way, _ in leaves(value)]
    for (_, new), (_, old) in zip(leaves(twice), leaves(value), strict=True):
        assert torch.equal(new, 2 * old) if isinstance(old, torch.Tensor) else new is old
    assert all(torch.equal(t % 1, torch.zeros_like(t)) for t in tensors_in(value))  # the old one is as it was


def test_a_container_in_two_places_stays_one():
    shared = UserDict(x=torch.ones(1))
    shared["self"] = shared
    one, other = rebuilt((shared, {"again": shared}), lambda t: t + 1)
    assert other["again"] is one
    assert one["self"] is one
    assert one is not shared


class Writer(nn.Module):
    """Block i reads what earlier blocks wrote, and writes something of its own."""

    def __init__(self, i, *, in_place=False):
        super().__init__()
        self.up = nn.Linear(6, 6)
        self.i, self.in_place = i, in_place

    def forward(self, x, cache):
        x = x + self.up(x) + sum(cache.values())
        if self.in_place and cache:
            cache[0].mul_(2)
        else:
            cache[self.i] = x.mean()
        return x


class Model(nn.Module):
    def __init__(self, blocks, cache=UserDict):
        super().__init__()
        self.config = type("Config", (), {"get_text_config": lambda self: self, "num_hidden_layers": len(blocks)})()
        self.embed, self.list, self.cache = nn.Embedding(97, 6), nn.ModuleList(blocks), cache

    def get_decoder(self):
        return self

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return None

    def forward(self, ids, use_cache):
        assert not use_cache
        x, cache = self.embed(ids), self.cache()
        for block in self.list:
            x = block(x, cache=cache)
        return x


@torch.no_grad()
def passed(model, windows, micro_batch):
    """What leaves the last block, one block at a time."""
    recording = capture_block_inputs(model, windows, micro_batch=micro_batch)
    hidden = recording.hidden
    for block, calls in zip(model.list, recording.calls, strict=True):
        through, outputs = BlockPass(block, calls, hidden), hidden.fresh()
        collect_statistics(through, Products, outputs)  # writes too, and must not be seen by the next pass
        again = hidden.fresh()
        for i, x in enumerate(hidden):
            call = through.call(i)
            again.append(run_block(block, x, call), call.written())
        assert all(map(torch.equal, outputs, again))
        hidden = again
    return hidden


@pytest.mark.parametrize("cache", [UserDict, dict])
def test_what_a_block_writes_goes_to_the_blocks_behind_it_for_each_micro_batch(cache):
    torch.manual_seed(0)
    model = Model([Writer(i) for i in range(3)], cache)
    with torch.no_grad():
        expected = [model(ids, use_cache=False) for ids in WINDOWS.split(2)]
    assert all(map(torch.equal, passed(model, WINDOWS, 2), expected))


def test_nothing_is_carried_that_no_block_behind_reads():
    model = Model([Writer(i) for i in range(3)])
    hidden = passed(model, WINDOWS, 2)
    assert all(not hidden.shared(i) for i in range(3))


def test_a_block_that_changes_what_is_shared_in_place_is_refused():
    model = Model([Writer(0), Writer(1, in_place=True), Writer(2)])
    with pytest.raises(InputError, match="changes a tensor in place that it shares"):
        passed(model, WINDOWS, 2)


def test_a_model_that_writes_where_blocks_write_is_refused():
    class Both(Model):
        def forward(self, ids, use_cache):  # noqa: ARG002 - as above
            x, cache = self.embed(ids), UserDict()
            for i, block in enumerate(self.list):
                x = block(x, cache=cache)
                cache[f"model {i}"] = torch.zeros(())
            return x

    with pytest.raises(InputError, match="the model around them change the same argument"):
        passed(Both([Writer(i) for i in range(3)]), WINDOWS, 2)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_a_store_keeps_what_goes_along(place):
    store = ActivationStore(place)
    x = torch.arange(12.0).view(3, 4)
    store.append(x, {7: UserDict(a=(x, x[1:]), b=x.T)})
    store.append(x + 1)
    found = store.shared(0)[7]
    assert torch.equal(found["a"][0], x)
    assert torch.equal(found["a"][1], x[1:])
    assert torch.equal(found["b"], x.T)
    found["c"] = 1  # is the caller's own
    assert "c" not in store.shared(0)[7]
    assert not store.shared(1)
    assert torch.equal(store[-1], x + 1)


def test_a_call_can_be_used_again_and_again():
    recorder = CallRecorder(1, ActivationStore("cpu"))
    recorder.begin(2)
    recorder.note(((torch.ones(1),), {"cache": UserDict()}), 0)
    recorder.end()
    first, second = (recorder.calls[0].at(0, "cpu") for _ in range(2))
    first.kwargs["cache"]["x"] = 1
    assert not second.kwargs["cache"]
    assert torch.equal(second.args[0], torch.ones(1))


def test_what_depends_on_blocks_is_refused_without_weights():
    class ByState(Model):
        def forward(self, ids, use_cache, **_):  # noqa: ARG002 - as above
            x = self.embed(ids)
            for block in self.list:
                x = block(x, cache={0: x.mean((1, 2), keepdim=True)})
            return x

    model = ByState([Writer(i) for i in range(3)]).to("meta")
    with pytest.raises(InputError, match="cache of block 1 depends on what the blocks before it compute"):
        require_chain(model)
    assert require_chain(Model([Writer(i) for i in range(3)]).to("meta")).beside == 0


@pytest.mark.parametrize("family", ["gpt2"])
def test_a_transposed_weight_is_read_and_put_back(family):
    block = Decoder.of(tiny(family)).blocks[0]
    found = compressible(block)
    assert list(found) == ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert found["attn.c_attn"].shape == (96, 32)
    x = torch.randn(2, 5, 32)
    for name, weight in found.items():
        if weight.shape[1] == 32:
            expected = block.get_submodule(name)(x)
            linear = nn.Linear(weight.shape[1], weight.shape[0])
            linear.weight.data, linear.bias.data = weight.read(), weight.bias
            weight.put(linear)
            assert block.get_submodule(name) is linear
            torch.testing.assert_close(linear(x), expected)
    assert compressible(block.to("meta")).keys() == found.keys()
