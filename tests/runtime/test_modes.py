"""Whole models in every mode: the same answers within a bound, and what models are used for."""

import copy
import pickle
import sys
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import sparlow
from coded import save_coded
from sparlow.errors import InputError
from sparlow.model.artefact.checkpoint import load
from sparlow.model.artefact.layers import SparseLowRankLinear, compressed_layers
from sparlow.model.loading.source import open_model
from sparlow.runtime import build, opening, which
from sparlow.runtime.build import NoKernelError, library
from sparlow.runtime.packed import PackedLinear

try:
    library()
except NoKernelError as problem:
    pytest.skip(str(problem), allow_module_level=True)

PATTERNS = {"int8": "2:4", "int4": "dense", "int3": "free"}
BOUND = {torch.float32: 1e-5, torch.bfloat16: 0.03}  # of the largest logit; dense mode computes in the model's type


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_coded("llama", "int8", torch.float32, tmp_path_factory.mktemp("model"))


@pytest.fixture
def packed(folder):
    return sparlow.load(folder, mode="packed")


IDS = torch.randint(2, 97, (2, 6), generator=torch.Generator().manual_seed(1))


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits.float()


def packed_layers(model):
    return [layer for layer in model.modules() if isinstance(layer, PackedLinear)]


@pytest.mark.parametrize(
    ("family", "values", "dtype"),
    [("llama", "int8", torch.float32), ("gpt2", "int4", torch.float32), ("qwen2", "int3", torch.bfloat16)],
)
def test_every_mode_gives_the_same_logits(family, values, dtype, tmp_path):
    folder = save_coded(family, values, dtype, tmp_path, PATTERNS[values])
    dense = sparlow.load(folder, mode="dense")
    right, few = logits(dense), logits(dense, IDS[:1, :2])
    for mode in ("packed", "merged"):
        model = sparlow.load(folder, mode=mode)
        assert len(packed_layers(model)) == (len(compressed_layers(dense)) if mode == "packed" else 0)
        assert not compressed_layers(model)
        for found, wanted in ((logits(model), right), (logits(model, IDS[:1, :2]), few)):
            assert (found - wanted).abs().max() <= BOUND[dtype] * wanted.abs().max()


def test_rounded_inputs_are_close_and_not_the_same(folder, packed):
    right = logits(packed)
    found = logits(sparlow.load(folder, mode="packed", activations="int8"), IDS[:1])
    assert 0 < (found - right[:1]).abs().max() <= 0.05 * right.abs().max()


@pytest.mark.skipif(sys.platform != "linux", reason="the list of mappings is Linux's")
def test_what_is_stored_is_mapped_from_the_file(folder, packed):
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
    for layer in packed_layers(packed):
        for matrix in (layer._operand.S, layer._operand.U, layer._operand.V):
            assert any(start <= matrix.struct.data < stop for start, stop in spans)


def test_generate_gives_the_same_tokens(folder, packed):
    dense = sparlow.load(folder)
    made = [m.generate(IDS, max_new_tokens=8, do_sample=False, pad_token_id=0) for m in (dense, packed)]
    assert made[1].shape == (2, 14)
    assert torch.equal(*made)


def test_from_pretrained_follows_the_context_then_the_environment(folder, monkeypatch):
    with sparlow.mode("packed"):
        assert packed_layers(AutoModelForCausalLM.from_pretrained(folder))
    assert compressed_layers(AutoModelForCausalLM.from_pretrained(folder))
    monkeypatch.setenv("SPARLOW_MODE", "packed")
    assert packed_layers(AutoModelForCausalLM.from_pretrained(folder))
    assert packed_layers(sparlow.load(folder))
    assert compressed_layers(sparlow.load(folder, mode="dense"))
    monkeypatch.setenv("SPARLOW_MODE", "fast")
    with pytest.raises(InputError, match=r"There is no mode 'fast'. Choose one of: dense, packed, merged, auto"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_what_sparlow_opens_for_itself_is_dense_whatever_the_user_has_chosen(folder, monkeypatch):
    monkeypatch.setenv("SPARLOW_MODE", "packed")
    assert compressed_layers(load(folder))
    with sparlow.mode("packed"):
        assert compressed_layers(open_model(str(folder)).model)


def test_copies_and_pickles_share_or_hold_what_is_stored(packed):
    right = logits(packed)
    other = copy.deepcopy(packed)
    mine, its = packed_layers(packed)[0], packed_layers(other)[0]
    assert mine is not its
    assert mine.packed.parts["weight"].data_ptr() == its.packed.parts["weight"].data_ptr()
    assert torch.equal(logits(other), right)
    assert torch.equal(logits(pickle.loads(pickle.dumps(packed))), right)  # noqa: S301 - our own


def test_casts_leave_what_is_stored_alone(packed):
    layer = packed_layers(packed)[0]
    before = {part: t.clone() for part, t in layer.state_dict().items()}
    x = torch.randn(3, layer.in_features)
    right = layer(x)
    for cast in (layer.half, layer.bfloat16, layer.double, layer.float):
        cast()
        assert all(
            torch.equal(t, before[part]) and t.dtype == before[part].dtype for part, t in layer.state_dict().items()
        )
        assert torch.equal(layer(x), right)
    assert layer(x.half()).dtype == torch.float16
    assert layer(x.double()).dtype == torch.float64


def test_the_state_dict_is_what_the_file_holds(folder, packed):
    state = packed.state_dict()
    name = "model.layers.0.mlp.up_proj"
    assert {key.rpartition(".")[2] for key in state if key.startswith(f"{name}.")} == {
        "weight", "mask", "scale", "U", "V", "U_scale", "V_scale",
    }  # fmt: skip
    other = sparlow.load(folder, mode="packed")
    other.get_submodule(name)._take(
        {k: torch.zeros_like(t) if k == "U" else t for k, t in other.get_submodule(name).packed.tensors.items()}
    )
    assert not torch.equal(logits(other), logits(packed))
    other.load_state_dict(state)
    assert torch.equal(logits(other), logits(packed))
    del state[f"{name}.mask"]
    with pytest.raises(RuntimeError, match=r"Missing key.*up_proj\.mask"):
        other.load_state_dict(state)


@pytest.mark.parametrize("mode", ["packed", "merged"])
def test_what_is_saved_opens_again(mode, folder, tmp_path):
    model = sparlow.load(folder, mode=mode)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert bool(compressed_layers(again)) == (mode == "packed")
    right = logits(model)
    assert (logits(again) - right).abs().max() <= 1e-5 * right.abs().max()


def test_a_packed_layer_becomes_one_to_train(folder, packed):
    name = "model.layers.1.mlp.up_proj"
    dense = sparlow.load(folder).get_submodule(name)
    layer = packed.get_submodule(name).dequantize()
    assert isinstance(layer, SparseLowRankLinear)
    assert all(torch.equal(getattr(layer, part), getattr(dense, part)) for part in "SUV")
    assert torch.equal(packed.get_submodule(name).weight, dense.weight)
    assert layer.stored.grid == dense.stored.grid


def test_gradients_pass_through_packed_layers(folder, packed):
    dense, found = sparlow.load(folder), []
    for model in (dense, packed):
        embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
        model(inputs_embeds=embedded).logits.square().sum().backward()
        found.append(embedded.grad)
    assert found[0].abs().max() > 0
    assert (found[0] - found[1]).abs().max() <= 1e-4 * found[0].abs().max()


def test_a_packed_layer_is_one_operator_to_torch_compile(packed):
    layer = packed_layers(packed)[0]
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x = torch.randn(2, 3, layer.in_features)
    assert torch.equal(compiled(x), layer(x))


def test_what_cannot_be_computed_says_so(folder, packed):
    layer = packed_layers(packed)[0]
    with pytest.raises(InputError, match=r"must have 32 columns, not 31"):
        layer(torch.zeros(2, 31))
    with pytest.raises(InputError, match=r"not on meta. Open the model with mode='dense'"):
        layer(torch.zeros(2, 32, device="meta"))
    with pytest.raises(InputError, match=r"There is no mode 'sparse'. Choose one of: dense"):
        sparlow.load(folder, mode="sparse")
    with pytest.raises(InputError, match=r"There are no activations 'int4'"):
        sparlow.load(folder, mode="packed", activations="int4")


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    """A machine without a compiler, on which nothing has been compiled either."""
    monkeypatch.setenv("SPARLOW_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", str(tmp_path / "nothing"))
    monkeypatch.setattr(build, "prebuilt", lambda: tmp_path / "nothing")
    for module in (opening, which):
        monkeypatch.setattr(module, "library", build.library.__wrapped__)


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_a_model_is_merged_and_one_sentence_says_so(folder, caplog):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = sparlow.load(folder, mode="packed")
    said = [str(w.message) for w in told if "merged" in str(w.message)]
    assert len(said) == 1
    assert said[0].startswith("The model is opened merged, not packed. There is no C compiler")
    assert isinstance(model.model.layers[0].mlp.up_proj, torch.nn.Linear)
    assert "opened" not in caplog.text
    sparlow.load(folder, mode="auto")
    assert "The model is opened merged: There is no C compiler" in caplog.text


def test_auto_says_once_what_it_took(folder, caplog):
    model = sparlow.load(folder, mode="auto")
    assert caplog.text.count("The model is opened") == 1
    packed = packed_layers(model)
    assert bool(packed) == ("opened packed" in caplog.text) == (library().paths[-1] != "plain")
    assert ("rounded to int8, unless activations is 'float'" in caplog.text) == bool(packed)
    assert {layer.activations for layer in packed if hasattr(layer, "activations")} <= {"int8"}


def test_auto_rounds_no_inputs_where_that_is_said(folder, caplog, monkeypatch):
    for said in ({"activations": "float"}, {}):
        model = sparlow.load(folder, mode="auto", **said)
        assert {layer.activations for layer in packed_layers(model) if hasattr(layer, "activations")} <= {"float"}
        monkeypatch.setenv("SPARLOW_ACTIVATIONS", "float")
    assert "rounded to int8" not in caplog.text


def test_it_is_said_which_kernel_is_used_and_where_it_lies(monkeypatch, folder, caplog):
    found = which.kernel()
    assert (found.path, found.file, found.origin) == (library().paths[-1], library().file, library().origin)
    assert str(found).startswith(f"{found.path}, prebuilt" if found.origin == "prebuilt" else f"{found.path}, compiled")
    monkeypatch.setenv("SPARLOW_KERNEL", "plain")
    assert which.kernel().path == "plain"
    assert not packed_layers(sparlow.load(folder, mode="auto"))
    assert "opened merged: the kernel has no instruction set for this processor" in caplog.text
    monkeypatch.setenv("SPARLOW_KERNEL", "avx9")
    assert str(which.kernel()).startswith("none: There is no kernel for avx9 on this processor. Choose one of plain")


@pytest.mark.usefixtures("no_compiler")
def test_it_is_said_why_there_is_no_kernel():
    found = which.kernel()
    assert (found.path, found.file, found.origin) == ("", None, "none")
    assert str(found).startswith("none: There is no C compiler")


def test_other_flags_make_another_library(monkeypatch):
    before = build.fingerprint("cc 1.0"), build.prebuilt()
    monkeypatch.setenv("SPARLOW_KERNEL_FLAGS", "-g")
    assert build.fingerprint("cc 1.0") != before[0]
    assert build.prebuilt() == before[1]


def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo "cc 1.0" && exit 0\necho "x.c: error: no such thing" >&2\nexit 1\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("SPARLOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "prebuilt", lambda: tmp_path / "nothing")
    with pytest.raises(NoKernelError, match=r"failed \(x.c: error: no such thing\). Install another"):
        build.library.__wrapped__()
    assert not list((tmp_path / "cache").rglob("*.so"))
