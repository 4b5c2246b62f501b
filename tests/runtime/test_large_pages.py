"""Weights in large pages: the same numbers at another place, where the system has such pages."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import sparlow
from runnable import write
from sparlow.runtime import pages, placement
from sparlow.runtime.build import NoKernelError, library
from sparlow.runtime.packed import PackedModule
from sparlow.runtime.stepping import use_step

try:
    library()
except NoKernelError as problem:
    pytest.skip(str(problem), allow_module_level=True)

IDS = torch.randint(2, 97, (2, 7), generator=torch.Generator().manual_seed(1))
SMALL = 1 << 12  # bytes of what these tests take for a large page


@pytest.fixture
def large(monkeypatch, tmp_path):
    """A system that has them, of a size that a tiny model fills."""
    setting = tmp_path / "enabled"
    setting.write_text("always [madvise] never\n")
    monkeypatch.setattr(pages, "_SETTING", setting)
    monkeypatch.setattr(pages, "PAGE", SMALL)
    monkeypatch.setattr(placement, "PAGE", SMALL)
    monkeypatch.setattr(pages, "_BLOCK", 4 * SMALL)
    return setting


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("model"), "gpt2", ("int8", "int8"), group=8)  # its ends are tied


@pytest.fixture
def packed(folder):
    return sparlow.load(folder, mode="packed")


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def places(model):
    """Where all lies but GPT-2's embedding of positions, of which a token reads a row."""
    packed = [t for m in model.modules() if isinstance(m, PackedModule) for t in m.packed.tensors.values() if t.numel()]
    return [t.data_ptr() for t in (*packed, *(p for name, p in model.named_parameters() if "wpe" not in name))]


@pytest.mark.usefixtures("large")
def test_every_weight_moves_and_no_number_changes(packed):
    before, was, state = places(packed), logits(packed), {k: v.clone() for k, v in packed.state_dict().items()}
    placement.use_large_pages(packed)
    after = places(packed)
    assert not set(before) & set(after)
    assert len(set(before)) == len(set(after))  # what is tied lies there once
    assert all(place % 64 == 0 for place in after)
    assert torch.equal(logits(packed), was)
    assert all(torch.equal(tensor, state[name]) for name, tensor in packed.state_dict().items())
    assert packed.get_input_embeddings().packed is packed.get_output_embeddings().packed


@pytest.mark.usefixtures("large")
def test_a_block_begins_with_a_page_and_holds_weights_of_any_size(packed, monkeypatch):
    taken = []
    block = pages._block
    monkeypatch.setattr(pages, "_block", lambda size: taken.append(block(size)) or taken[-1])
    placement.use_large_pages(packed)
    assert len(taken) > 1
    assert all(memory.data_ptr() % SMALL == 0 for memory in taken)


@pytest.mark.usefixtures("large")
def test_a_moved_model_is_copied_saved_and_changed_as_before(packed, tmp_path):
    placement.use_large_pages(packed)
    was = logits(packed)
    other = copy.deepcopy(packed)
    assert torch.equal(logits(other), was)
    packed.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(sparlow.load(tmp_path / "saved", mode="packed")), was)
    norm = packed.transformer.ln_f
    with torch.no_grad():
        norm.weight.mul_(2)
    assert not torch.allclose(logits(packed), was)
    assert torch.equal(logits(other), was)


def dense_llama():
    config = AutoConfig.for_model(
        "llama", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=97,
        tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.usefixtures("large")
def test_a_dense_model_moves_before_its_first_step_and_stays_there():
    model = dense_llama()
    before, was = places(model), model.generate(IDS, max_new_tokens=6, do_sample=False)
    stepping = use_step(model)
    assert torch.equal(model.generate(IDS, max_new_tokens=6, do_sample=False), was)
    assert stepping.steps
    after = places(model)
    assert not set(before) & set(after)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    with torch.no_grad():
        model.model.norm.weight.mul_(0)
    assert (model.generate(IDS, max_new_tokens=2, do_sample=False)[:, 7:] == 0).all()  # a step for what it is now
    assert places(model) == after


@pytest.mark.usefixtures("large")
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not say what is mapped")
def test_no_packed_weight_keeps_its_file_mapped_not_even_one_of_rank_0(tmp_path):
    folder = write(tmp_path / "model", "llama", ("int8", "int8"), group=8)
    model = sparlow.load(folder, mode="packed")
    assert str(folder) in Path("/proc/self/maps").read_text()
    placement.use_large_pages(model)
    model.set_input_embeddings(None)  # which stays where it was
    assert str(folder) not in Path("/proc/self/maps").read_text()


@pytest.mark.usefixtures("large")
def test_embeddings_alone_stay(packed):
    positions = packed.transformer.wpe.weight.data_ptr()
    placement.use_large_pages(packed)
    assert packed.transformer.wpe.weight.data_ptr() == positions


@pytest.mark.usefixtures("large")
def test_gradients_reach_moved_parameters():
    model = dense_llama()
    placement.use_large_pages(model)
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("said", ["always madvise [never]\n", None])
def test_without_large_pages_nothing_moves(packed, large, said):
    large.write_text(said) if said else large.unlink()
    before = places(packed)
    placement.use_large_pages(packed)
    assert places(packed) == before


def test_another_system_has_none(monkeypatch):
    monkeypatch.delattr("mmap.MADV_HUGEPAGE", raising=False)
    assert not pages.has_large_pages()


@pytest.mark.usefixtures("large")
def test_small_models_and_memory_shared_with_other_processes_stay(packed, monkeypatch):
    model = dense_llama().share_memory()
    before = places(model)
    placement.use_large_pages(model)
    assert places(model) == before
    monkeypatch.setattr(placement, "PAGE", 1 << 30)
    before = places(packed)
    placement.use_large_pages(packed)
    assert places(packed) == before


@pytest.mark.usefixtures("large")
def test_packed_weights_stay_mapped_where_memory_is_short(packed, monkeypatch):
    before = places(packed)
    monkeypatch.setattr(placement, "memory_available", lambda: 10_000)
    placement.use_large_pages(packed)
    assert places(packed) == before


@pytest.mark.usefixtures("large")
def test_a_step_that_cannot_be_leaves_the_model_right(folder):
    model = sparlow.load(folder, mode="packed", step="kernel")  # GPT-2 is none that the kernel knows
    plain = sparlow.load(folder, mode="packed")
    asked = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS, **asked), plain.generate(IDS, **asked))
