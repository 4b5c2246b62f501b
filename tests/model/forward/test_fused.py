"""Experts in one parameter: told by what the model's code does with them, and taken apart without changing anything."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from families import tiny
from sparlow.model.forward.compressible import compressible, experts_apart, fused_of
from sparlow.model.forward.decoder import Decoder
from sparlow.model.forward.fused import FusedWeight, Layout, Slice, Slices
from sparlow.model.forward.fused_layout import layouts, put_together


def held(experts, *words, above=0):
    """A layout; the words say what is true of it."""
    how = {word: word in words for word in ("transposed", "flat", "routed")}
    return Layout(experts, **how, above=above)


IDS = torch.arange(2, 34)[None]
ROUTED, INNER = held(4, "routed"), held(4)
FOUND = {  # the parameters of a block, and how they hold their experts
    "mixtral": {"mlp.experts.gate_up_proj": ROUTED, "mlp.experts.down_proj": INNER},
    "gpt_oss": {
        "mlp.experts.gate_up_proj": held(4, "transposed", "routed"),
        "mlp.experts.down_proj": held(4, "transposed"),
    },
    "dbrx": {
        "ffn.experts.mlp.w1": held(12, "flat", "routed", above=1),
        "ffn.experts.mlp.v1": held(12, "flat", "routed", above=1),
        "ffn.experts.mlp.w2": held(12, "transposed", "flat", above=1),
    },
    "jetmoe": {
        name: held(12, "routed")
        for name in (
            *("self_attention.experts.input_linear.weight", "self_attention.experts.output_linear.weight"),
            *("mlp.input_linear.weight", "mlp.output_linear.weight"),
        )
    },
    "llama4": {
        "feed_forward.experts.gate_up_proj": held(4, "transposed", "routed"),
        "feed_forward.experts.down_proj": held(4, "transposed"),
    },
    "gemma4_moe": {
        "experts.gate_up_proj": held(12, "routed"),
        "experts.down_proj": held(12),
    },
}


def llama4():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "intermediate_size_mlp": 48, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 2}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1}
    config = AutoConfig.for_model("llama4_text", **sizes, **heads, **experts, pad_token_id=None)
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(1.0 if p.ndim == 1 else 0.0, 0.2, generator=generator)
    return model


def model_of(family):
    return llama4() if family == "llama4" else tiny(family)


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("family", FOUND)
def test_experts_are_found_and_taken_apart_and_the_model_computes_what_it_did(family):
    model = model_of(family)
    blocks = Decoder.of(model).blocks
    found = {
        f"{name}.{part}": layout
        for name, module in blocks[-1].named_modules()
        for part, layout in layouts(blocks[-1], name, module).items()
    }
    assert found == FOUND[family]
    before, state = logits(model), {name: p.clone() for name, p in model.state_dict().items()}
    configs = {name: vars(module).get("config") for name, module in model.named_modules()}
    called = set()
    for i, block in enumerate(blocks):
        experts_apart(block, compressible(block))
        for name, weight in compressible(block).items():
            hook = lambda *_, full=(i, name): called.add(full)  # noqa: E731 - of this layer
            block.get_submodule(weight.reads).register_forward_hook(hook)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    last = len(blocks) - 1
    for name, layout in FOUND[family].items():
        assert any((last, f"{name}.{number}") in called for number in range(layout.experts)), name
    for block in blocks:
        put_together(block)
    assert not any(isinstance(module, FusedWeight) for module in model.modules())
    assert {name: vars(module).get("config") for name, module in model.named_modules()} == configs
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items())
    assert torch.equal(logits(model), before)


def test_matrices_of_one_shape_hold_as_many_experts_as_their_module_says():
    counts = {}
    for experts in (12, 8):
        config = copy.deepcopy(tiny("dbrx").config)
        config.ffn_config.moe_num_experts, config.ffn_config.ffn_hidden_size = experts, 288 // experts
        block = Decoder.of(AutoModelForCausalLM.from_config(config)).blocks[0]
        assert {len(p) for name, p in block.named_parameters() if ".experts." in name} == {288}
        found = layouts(block, "ffn.experts.mlp", block.get_submodule("ffn.experts.mlp"))
        counts[experts] = [layout.experts for layout in found.values()]
    assert counts == {12: [12] * 3, 8: [8] * 3}


def test_a_parameter_that_is_no_set_of_experts_is_left_alone():
    class Stack(nn.Module):
        """Adds its slices up, and multiplies by one of them and by all."""

        def __init__(self):
            super().__init__()
            self.scales = nn.Parameter(torch.ones(3, 4, 5))
            self.table = nn.Parameter(torch.ones(4, 5))

        def forward(self, x, *_):
            return functional.linear(x, self.scales.sum(0)) @ self.table

    block = nn.Sequential(Stack(), nn.Conv1d(4, 4, 3))
    assert compressible(block) == {}


def stood_in(layout, count=3, out=4, features=6):
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(count, *((features, out) if layout.transposed else (out, features)), generator=generator)

    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.Parameter(W.flatten(0, 1) if layout.flat else W.clone())

    from sparlow.model.forward.fused_layout import take_apart

    owner = Owner()
    take_apart(owner, "", {"experts": layout})
    return owner.experts, W


@pytest.mark.parametrize("transposed", [False, True])
def test_what_is_no_product_with_an_expert_gets_the_dense_numbers(transposed):
    fused, W = stood_in(held(3, "routed", *(["transposed"] * transposed)))
    x = torch.randn(2, 6 if transposed else 4)
    assert torch.equal(fused[1].dense(), W[1])
    assert torch.equal(fused[torch.tensor([2, 0])], W[[2, 0]])
    assert torch.equal(fused.transpose(1, 2).dense(), W.mT)
    assert torch.equal(torch.sum(fused[2]), W[2].sum())
    assert torch.equal(torch.einsum("eij->e", fused), torch.einsum("eij->e", W))
    wrong_way = torch.matmul(x, fused[0]) if not transposed else functional.linear(x, fused[0].T)
    torch.testing.assert_close(wrong_way, x @ W[0])
    assert fused.shape == W.shape
    assert [len(part) for part in fused] == [len(part) for part in W]
    with pytest.raises(IndexError):
        fused[3]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_products_with_experts_call_their_layers(transposed, flat):
    fused, W = stood_in(held(3, "routed", *(["transposed"] * transposed), *(["flat"] * flat)))
    called = []
    for number in range(3):
        fused.layer(number).register_forward_hook(lambda *_, number=number: called.append(number))
    x, bias = torch.randn(5, 6), torch.randn(4)
    slices = fused.view(W.shape) if flat else fused
    one = slices[torch.tensor(1)]
    assert isinstance(one, Slice)
    expected = x @ (W[1] if transposed else W[1].T)
    for found in (
        functional.linear(x, one.T if transposed else one),
        x @ (one if transposed else one.T),
        torch.matmul(x, one if transposed else one.transpose(0, 1)),
    ):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(functional.linear(x, one.T if transposed else one, bias), expected + bias)
    assert called == [1, 1, 1, 1]
    called.clear()
    every = torch.randn(3, 5, 6)
    every[1] = 0  # no token of its own
    whole = slices if transposed else slices.transpose(1, 2)
    assert isinstance(whole, Slices | FusedWeight)
    torch.testing.assert_close(torch.bmm(every, whole), torch.bmm(every, W if transposed else W.mT))
    assert called == [0, 2]


def test_an_expert_without_tokens_is_not_looked_at():
    fused, _ = stood_in(held(3, "routed"))
    fused._modules["1"] = None
    assert functional.linear(torch.empty(0, 6), fused[1]).shape == (0, 4)


def test_a_copy_of_a_block_has_experts_of_its_own():
    block = Decoder.of(tiny("mixtral")).blocks[0]
    experts_apart(block, compressible(block))
    twin = copy.deepcopy(block)
    (name, fused), *_ = fused_of(twin).items()
    with torch.no_grad():
        fused.layer(0).weight.zero_()
    assert fused_of(block)[name].layer(0).weight.any()
