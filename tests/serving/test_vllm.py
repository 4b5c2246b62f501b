"""The plug-in for vLLM against a restatement of vLLM's loader: every layer computes what sparlow itself computes."""

import logging
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

import server
import sparlow
from artefacts import edit
from results import write_result
from sparlow.errors import InputError
from sparlow.files import CONFIG
from sparlow.runtime.build import NoKernelError, library
from sparlow.serving.plugin import register

try:
    library()
except NoKernelError as problem:
    pytest.skip(str(problem), allow_module_level=True)


@pytest.fixture
def vllm(monkeypatch):
    """vLLM with the plug-in loaded; what the plug-in has logged."""
    server.install(monkeypatch)
    register()
    register()  # each process may call it more than once
    assert server.METHODS == ["sparlow"]
    methods = import_module("sparlow.serving.vllm_methods")
    said = []
    monkeypatch.setattr(methods, "say", lambda sentence, _level=logging.WARNING: said.append(sentence))
    return said


def compare(model, folder, *, bound=1e-5):
    """Compare every layer of a served model with those that sparlow opens."""
    ours = sparlow.load(folder, mode="dense", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, ours.config.vocab_size, (3, 5), generator=generator)
    embedded = ours.get_input_embeddings()(ids)
    assert torch.equal(model.model.embed_tokens(ids), embedded)
    padded = model.lm_head.quant_method.apply(model.lm_head, embedded)
    rows = ours.config.vocab_size
    assert torch.allclose(padded[..., :rows], ours.get_output_embeddings()(embedded), atol=bound)
    assert padded.shape[-1] == -(-rows // 64) * 64
    assert not padded[..., rows:].any()
    for name, layer in model.named_modules():
        if isinstance(layer, server.LinearBase):
            head, _, last = name.rpartition(".")
            parts = [ours.get_submodule(f"{head}.{part}") for part in server.PACKED.get(last, [last])]
            x = torch.randn(3, parts[0].in_features, generator=generator)
            with torch.no_grad():
                expected = torch.cat([part(x) for part in parts], -1)
            assert torch.allclose(layer(x), expected, atol=bound), name


FORMS = (
    {},
    {"pattern": "free", "ranks": (3, 0, 5)},
    {"values": "int4", "embedding": "int8"},
    {"values": "int4", "pattern": "dense", "levels": "integer", "embedding": "int4"},
    {"values": "int3", "pattern": "free", "levels": "book"},
    {"values": "int8", "pattern": "dense", "ranks": (0,)},
)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_layer_computes_what_sparlow_computes(family, form, tmp_path, vllm):
    write_result(tmp_path, family, blocks=1, **form)
    model = serve_packed(tmp_path, vllm)
    compare(model, tmp_path)
    held = sum(t.numel() for t in model.state_dict().values())
    assert held <= 2 * model.model.embed_tokens.num_embeddings * model.model.embed_tokens.embedding_dim + 1000


def test_inputs_are_rounded_where_the_environment_says_so(tmp_path, vllm, monkeypatch):
    write_result(tmp_path, values="int4", pattern="dense", levels="integer", ranks=(0,), group=64)
    monkeypatch.setenv("SPARLOW_ACTIVATIONS", "int8")
    layer = server.serve(tmp_path).model.layers[0].mlp.down_proj
    assert any("rounded to int8" in sentence for sentence in vllm)
    x = torch.randn(2, layer.quant_method.packed.shape[1], generator=torch.Generator().manual_seed(0))
    monkeypatch.setenv("SPARLOW_ACTIVATIONS", "float")
    exact = server.serve(tmp_path).model.layers[0].mlp.down_proj(x)
    off = (layer(x) - exact).norm() / exact.norm()
    assert 1e-4 < off < 0.03
    monkeypatch.setenv("SPARLOW_ACTIVATIONS", "int7")
    with pytest.raises(InputError, match="SPARLOW_ACTIVATIONS cannot be 'int7'"):
        server.serve(tmp_path)


def serve_packed(folder, said):
    model = server.serve(folder)
    assert said
    assert all("stay packed" in sentence for sentence in said)
    return model


def test_layers_that_were_left_dense_are_served_beside_compressed_ones(tmp_path, vllm):
    """One of q, k and v left as it is, and a whole layer: the first is joined with packed ones, the other is vLLM's."""

    write_result(tmp_path, values="int4", others={"k_proj": None, "down_proj": None})
    served = serve_packed(tmp_path, vllm)
    compare(served, tmp_path)
    down = served.model.layers[0].mlp.down_proj
    assert isinstance(down.quant_method, server.UnquantizedLinearMethod)


def test_on_an_accelerator_layers_are_expanded_and_this_is_said(tmp_path, vllm, monkeypatch):
    write_result(tmp_path, values="int4", embedding="int8", blocks=1)
    methods = sys.modules["sparlow.serving.vllm_methods"]
    why = methods._why_not_packed
    monkeypatch.setattr(methods, "_why_not_packed", lambda weights, _: why(weights, torch.device("cuda")))
    model = server.serve(tmp_path)
    compare(model, tmp_path)
    assert set(vllm) == {
        "Layers that sparlow compressed are expanded to dense ones: the kernel computes on the CPU, not on cuda."
    }
    layer = model.model.layers[0].self_attn.qkv_proj
    assert layer.weight.shape == (sum(layer.sizes), model.model.embed_tokens.embedding_dim)


def test_without_a_kernel_layers_are_expanded_and_this_is_said(tmp_path, vllm, monkeypatch):
    def none():
        raise NoKernelError("There is no C compiler (cc). Install one, such as gcc.")

    write_result(tmp_path, values="int4", blocks=1)
    monkeypatch.setattr("sparlow.runtime.product.library", none)
    compare(server.serve(tmp_path), tmp_path)
    assert any("There is no C compiler" in sentence for sentence in vllm)


def test_numbers_of_64_bits_are_expanded(tmp_path, vllm):
    write_result(tmp_path, dtype=torch.float64, blocks=1)
    compare(server.serve(tmp_path), tmp_path)
    assert all("64 bits" in sentence for sentence in vllm)


def test_models_are_not_divided_among_processes(tmp_path, vllm):  # noqa: ARG001 - loads the plug-in
    write_result(tmp_path)
    with pytest.raises(InputError, match=r"cannot be divided by tensor parallelism. Give --tensor-parallel-size 1. Or"):
        server.serve(tmp_path, tp=2)


@pytest.mark.parametrize(
    ("name", "around"),
    [
        ("model.layers.1.mlp.experts.3.up_proj", "mlp.experts"),
        ("model.layers.1.mlp.experts.gate_up_proj.3", "mlp.experts"),
        ("model.layers.1.mlp.experts.gate_up_proj.3", "block_sparse_moe.experts"),  # as vLLM calls it in Mixtral
    ],
)
def test_experts_are_refused_by_name(name, around, vllm):  # noqa: ARG001 - loads the plug-in
    scheme = {"pattern": "2:4", "values": "bf16", "rank": 0, "factors": "bf16"}
    config = server.CONFIGS["sparlow"].from_config({"format": 2, "schemes": [scheme], "layers": {name: [0, 32]}})
    with pytest.raises(InputError, match=rf"^{name} is compressed and part of a RoutedExperts, which.*--as merged"):
        config.get_quant_method(server.RoutedExperts(), f"model.layers.1.{around}")
    assert config.get_quant_method(nn.Module(), "model.layers.1.self_attn.attn") is None
    assert config.get_quant_method(server.RoutedExperts(), f"model.layers.10.{around}") is None


def test_a_mixture_is_refused_before_its_weights_are_read(tmp_path, vllm):  # noqa: ARG001 - loads the plug-in
    write_result(tmp_path, "mixtral")
    with pytest.raises(InputError, match=r"^model.layers.0.mlp.experts.down_proj.0 is compressed and part of a"):
        server.serve(tmp_path, weights=[])


def without(name, weights):
    return ((key, tensor) for key, tensor in weights if not key.endswith(name))


def changed(name, change, weights):
    return ((key, change(tensor) if key.endswith(name) else tensor) for key, tensor in weights)


@pytest.mark.parametrize("part", ["weight", "mask", "scale", "U", "V"])
def test_what_is_missing_or_damaged_is_named(part, tmp_path, vllm):  # noqa: ARG001 - loads the plug-in
    write_result(tmp_path, values="int4")
    name = f"layers.1.self_attn.v_proj.{part}"
    with pytest.raises(InputError, match=r"^model.layers.1.self_attn.v_proj should have the tensors"):
        server.serve(tmp_path, weights=without(name, server.tensors(tmp_path)))
    with pytest.raises(InputError, match=rf"^model.layers.1.self_attn.v_proj.{part} should have the shape"):
        server.serve(tmp_path, weights=changed(name, lambda t: t[:-1], server.tensors(tmp_path)))


def test_numbers_that_are_not_finite_are_refused_by_name(tmp_path, vllm):  # noqa: ARG001 - loads the plug-in
    write_result(tmp_path, values="int4")
    spoilt = changed("layers.0.mlp.up_proj.scale", lambda t: t * torch.nan, server.tensors(tmp_path))
    with pytest.raises(InputError, match=r"^model.layers.0.mlp.up_proj: Its scale holds numbers that are not finite"):
        server.serve(tmp_path, weights=spoilt)


def test_other_formats_are_refused(tmp_path, vllm):  # noqa: ARG001 - loads the plug-in
    write_result(tmp_path)
    for found, said in {1: "an older sparlow", 3: "a newer sparlow"}.items():
        edit(tmp_path / CONFIG, lambda config, found=found: config["quantization_config"].update(format=found))
        with pytest.raises(InputError, match=said):
            server.serve(tmp_path)


def test_a_compiled_graph_has_the_kernel_as_one_operator(tmp_path, vllm):
    write_result(tmp_path, values="int4", embedding="int8")
    model = serve_packed(tmp_path, vllm)
    layer, embedding = model.model.layers[0].self_attn.qkv_proj, model.model.embed_tokens
    seen = []

    def backend(graph, _):
        seen.append(str(graph.graph))
        return graph.forward

    compiled = torch.compile(lambda ids: layer(embedding(ids)), backend=backend, fullgraph=True)
    ids = torch.tensor([[3, 5], [7, 96]])
    assert torch.equal(compiled(ids), layer(embedding(ids)))
    assert len(seen) == 1
    assert "served_product" in seen[0]
    assert "served_rows" in seen[0]


def test_the_plug_in_brings_no_transformers():
    """vLLM imports it in every process, before its own transformers, whichever that is."""
    program = (
        "import sys, sparlow.serving.plugin, sparlow.serving.weights; "
        "print([name for name in ('transformers', 'datasets', 'accelerate', 'typer', 'rich') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env={"PYTHONPATH": _here()}
    )
    assert done.stdout == "[]\n"


def _here():
    return str(Path(sparlow.__file__).parents[1])


def test_the_wheel_tells_vllm_where_it_is():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["entry-points"] == {"vllm.general_plugins": {"sparlow": "sparlow.serving.plugin:register"}}
