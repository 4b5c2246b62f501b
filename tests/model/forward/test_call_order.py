"""Stages of a block's layers, told by what is computed from what."""

import pytest
import torch
from torch import nn

from families import tiny
from sparlow.distributed import Processes
from sparlow.errors import InputError, RunError
from sparlow.linalg.gram import GramAccumulator
from sparlow.model.forward.activation_store import ActivationStore
from sparlow.model.forward.block_pass import BlockPass
from sparlow.model.forward.call_order import Dependences, observe_dependences
from sparlow.model.forward.calls import BlockCalls, Call
from sparlow.model.forward.capture import capture_block_inputs
from sparlow.model.forward.compressible import experts_apart
from sparlow.model.forward.decoder import Decoder
from sparlow.model.forward.input_statistics import Stage, collect_statistics
from sparlow.model.forward.roles import kept_dense

WINDOWS = torch.randint(2, 97, (4, 20), generator=torch.Generator().manual_seed(1))
ATTENTION = [
    {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"},
    {"self_attn.o_proj"},
]


def experts(part):
    return {f"mlp.experts.{part}.{number}" for number in range(4)}


FOUND = {
    "llama": [*ATTENTION, {"mlp.gate_proj", "mlp.up_proj"}, {"mlp.down_proj"}],
    "gpt2": [{"attn.c_attn"}, {"attn.c_proj"}, {"mlp.c_fc"}, {"mlp.c_proj"}],
    "falcon_alibi": [
        {"self_attention.query_key_value", "mlp.dense_h_to_4h"},
        {"self_attention.dense", "mlp.dense_4h_to_h"},
    ],
    "qwen2_moe": [
        *ATTENTION,
        {"mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", *experts("gate_up_proj")},
        {"mlp.shared_expert.down_proj", *experts("down_proj")},
    ],
    "mixtral": [*ATTENTION, experts("gate_up_proj"), experts("down_proj")],
    "deepseek_v3": [
        {"self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"},
        {"self_attn.q_b_proj", "self_attn.kv_b_proj"},
        {"self_attn.o_proj"},
        {"mlp.gate_proj", "mlp.up_proj"},
        {"mlp.down_proj"},
    ],
    "mamba": [{"mixer.in_proj"}, {"mixer.x_proj"}, {"mixer.out_proj"}],
    "falcon_h1": [
        {"mamba.in_proj", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"},
        {"mamba.out_proj", "self_attn.o_proj"},
        {"feed_forward.gate_proj", "feed_forward.up_proj"},
        {"feed_forward.down_proj"},
    ],
}


@pytest.mark.transformers
@pytest.mark.parametrize("family", FOUND)
def test_stages_of_a_family(family):
    model = tiny(family)
    decoder = Decoder.of(model)
    recording = capture_block_inputs(model, WINDOWS, micro_batch=2)
    through = BlockPass(decoder.blocks[0], recording.calls[0], recording.hidden, decoder.label(0))
    dense = kept_dense(model, decoder)
    experts_apart(through.block, through.weights)
    names = [name for name in through.weights if decoder.layer_name(0, name) not in dense]
    stages, why = observe_dependences(through, names).stages(names)
    assert [set(stage.names) for stage in stages] == FOUND[family]
    assert why == ""
    assert all(stage.called_once for stage in stages)
    assert [stage.behind_others for stage in stages] == [False] + [True] * (len(stages) - 1)


class Bare(BlockCalls):
    """Calls of blocks that take a hidden state alone."""

    def __init__(self):
        super().__init__(ActivationStore("cpu"))

    def at(self, *_):
        return Call()


class Made(nn.Module):
    """A block of linear layers a, b, c, … whose forward is given."""

    def __init__(self, forward, names="abc"):
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(6, 6))
        self.seen = 0
        self.computes = forward

    def forward(self, x):
        self.seen += 1
        return self.computes(self, x)


def ordered(forward, names="abc"):
    """Stages of the layers of a block that computes ``forward``, the reason, and how many forwards it took."""
    block = Made(forward, names)
    inputs = torch.randn(3, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    through = BlockPass(block, Bare(), ActivationStore("cpu", inputs), "block")
    stages, why = observe_dependences(through, names).stages(names)
    return ["".join(stage.names) for stage in stages], why, block.seen


def in_slices(m, x):
    y = torch.empty_like(x)
    y[..., :3] = m.a(x)[..., :3]
    y[..., 3:].copy_(x[..., 3:])
    return m.c(m.b(y))


def through_numpy(m, x):
    y = torch.from_numpy(m.a(x).numpy() * 2)
    return m.c(m.b(y))


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (lambda m, x: m.c(x) + m.b(x) + m.a(x), ["abc"]),
        (lambda m, x: m.a(m.b(m.c(x))), ["c", "b", "a"]),
        (lambda m, x: m.b(m.a(x)[:, 1:].transpose(0, 1)).transpose(0, 1) + m.c(x)[:, 1:], ["ac", "b"]),
        (lambda m, x: m.c(x + torch.where(m.a(x) > 0, m.b(x), 0.0)), ["ab", "c"]),
        (lambda m, x: m.c(x[:, m.a(x)[0, :, 0].argsort()]) + m.b(x), ["ab", "c"]),
        (in_slices, ["a", "b", "c"]),
        (through_numpy, ["a", "b", "c"]),
    ],
    ids=["parallel", "chain", "views", "two", "by values", "in slices", "foreign code"],
)
def test_what_is_computed_from_what(forward, expected):
    stages, why, forwards = ordered(forward)
    assert (stages, why) == (expected, "")
    assert forwards == 1


def test_layers_that_stay_dense_make_no_stage_of_their_own():
    found = Dependences({"a": set(), "b": {"a"}, "c": {"a", "b"}})
    assert [stage.names for stage in found.stages(["a", "c"])[0]] == [("a",), ("c",)]
    assert [stage.names for stage in found.stages(["b"])[0]] == [("b",)]
    assert [stage.names for stage in found.stages([])[0]] == [()]


def experts(m, x):
    """First layers a, c, e and second ones b, d, f of three experts, of which each micro-batch reaches one or two."""
    y = x.clone()
    for i, (first, second) in enumerate((("a", "b"), ("c", "d"), ("e", "f"))):
        if m.seen != i + 1:
            rows = [[0, 1], [2, 3], [1, 2]][i]
            y[:, rows] += getattr(m, second)(getattr(m, first)(x[:, rows]))
    return y


def test_experts_share_stages_and_are_waited_for():
    stages, why, forwards = ordered(experts, "abcdef")
    assert (stages, why) == (["ace", "bdf"], "")
    assert forwards == 2  # the first left one out


def test_a_layer_that_is_never_called_comes_first_and_is_looked_for_to_the_end():
    stages, why, forwards = ordered(lambda m, x: m.b(m.a(x)))
    assert (stages, why, forwards) == (["ac", "b"], "", 3)


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.c(m.b(m.a(m.a(x)))),
        lambda m, x: m.a(m.b(x)) + m.b(m.a(x)) + m.c(x),
        lambda m, x: m.a(m.b(x)) if m.seen % 2 else m.c(m.b(m.a(x))),
    ],
    ids=["itself", "each other", "by micro-batch"],
)
def test_there_is_one_stage_where_no_order_can_be_told(forward):
    stages, why, _ = ordered(forward)
    assert stages == ["abc"]
    assert "computed from each other's outputs or from their own" in why


def test_a_layer_that_is_called_twice_on_what_is_not_its_own_is_seen_to_the_end():
    block = Made(lambda m, x: m.a(x) + m.b(x) + m.c(m.a(x + 1)))
    through = BlockPass(block, Bare(), ActivationStore("cpu", torch.randn(3, 2, 4, 6)), "block")
    (first, second), why = observe_dependences(through, "abc").stages("abc")
    assert (first, second, why) == (Stage(("a", "b")), Stage(("c",), called_once=True, behind_others=True), "")
    seen = collect_statistics(through, GramAccumulator, stage=first)
    assert {name: seen.statistics[name].tokens for name in seen.owner} == {"a": 48, "b": 24}


def test_processes_agree_on_what_only_some_of_them_saw(monkeypatch):
    told = [{"a": []}, {"b": ["a"], "c": []}]
    monkeypatch.setattr(Processes, "all_gather", lambda _, value: [value, *told])
    found = Dependences({"c": {"b"}})
    found.agreed(Processes(0, 3))
    assert [stage.names for stage in found.stages("abc")[0]] == [("a",), ("b",), ("c",)]


def test_a_process_without_windows_sees_nothing_and_says_so():
    block = Made(lambda m, x: m.c(m.b(m.a(x))))
    through = BlockPass(block, Bare(), ActivationStore("cpu", torch.zeros(2, 0, 4, 6)), "block")
    assert observe_dependences(through, "abc").before == {}
    assert block.seen == 0


def test_a_pass_ends_at_the_last_layer_of_its_stage():
    called = []

    def forward(m, x):
        y = m.b(m.a(x))
        called.append("b")
        return m.c(y)

    block = Made(forward)
    through = BlockPass(block, Bare(), ActivationStore("cpu", torch.randn(3, 2, 4, 6)), "block")
    seen = collect_statistics(through, GramAccumulator, stage=Stage(("a", "b"), called_once=True))
    assert seen.owner == {"a": "a", "b": "b"}
    assert seen.statistics["b"].tokens == 24
    assert called == []
    outputs = ActivationStore("cpu")
    collect_statistics(through, GramAccumulator, outputs, Stage(("a",), called_once=True))
    assert (len(called), len(outputs)) == (3, 3)  # which are wanted


def test_numbers_that_go_wrong_are_named_with_what_to_do():
    block = Made(lambda m, x: m.c(m.b(m.a(x))))
    through = BlockPass(block, Bare(), ActivationStore("cpu", torch.randn(2, 2, 4, 6)), "block 3")
    with torch.no_grad():
        block.b.weight[0] = torch.inf
    with pytest.raises(InputError, match="block 3: a weight of b is not finite"):
        observe_dependences(through, "abc")
    with pytest.raises(RunError, match=r"block 3: the input of c is not finite behind .* Raise --damping"):
        collect_statistics(through, GramAccumulator, stage=Stage(("c",), called_once=True, behind_others=True))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in block.modules())
