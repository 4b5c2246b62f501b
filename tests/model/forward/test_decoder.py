from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

from families import EXTRAS, FAMILIES, linears, tiny
from sparlow.errors import InputError
from sparlow.model.forward.activation_store import ActivationStore
from sparlow.model.forward.block_pass import BlockPass, run_block
from sparlow.model.forward.calls import CallRecorder
from sparlow.model.forward.capture import capture_block_inputs
from sparlow.model.forward.compressible import compressible
from sparlow.model.forward.decoder import Decoder, not_compressed
from sparlow.model.forward.input_statistics import collect_statistics

SEQLEN = 20  # longer than the sliding windows


@pytest.fixture
def windows():
    return torch.randint(2, 97, (5, SEQLEN), generator=torch.Generator().manual_seed(1))


class Products:
    """Σ x xᵀ."""

    def __init__(self, features, device):
        self.H = torch.zeros(features, features, device=device)

    def add(self, x):
        x = x.flatten(0, -2).float()
        self.H += x.T @ x


def bare_calls(count):
    """How a block is called that takes its hidden state and nothing else, for so many micro-batches."""
    recorder = CallRecorder(1, ActivationStore("cpu"))
    for _ in range(count):
        recorder.begin(2)
        recorder.note(((), {}), 0)
        recorder.end()
    return recorder.calls[0]


def products_of_each(through):
    """Σ x xᵀ of every linear by itself."""
    found = {}

    def note(name):
        def hook(_, args):
            found.setdefault(name, Products(args[0].shape[-1], args[0].device)).add(args[0])

        return hook

    handles = [m.register_forward_pre_hook(note(name)) for name, m in linears(through.block).items()]
    with torch.no_grad():
        for i, x in enumerate(through.hidden):
            run_block(through.block, x, through.call(i))
    for handle in handles:
        handle.remove()
    return found


def hooks_of(model):
    return [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__]


def own_pass(model, blocks, ids):
    """Hidden states behind every block, and logits, of the model's own forward."""
    states = []
    handles = [
        b.register_forward_hook(lambda _, __, y: states.append(y[0] if isinstance(y, tuple) else y)) for b in blocks
    ]
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return states, logits


def logits_behind(model, block, state, ids):
    """Logits of the model if ``block``, its last one, returned ``state``."""
    handle = block.register_forward_hook(lambda _, __, y: (state, *y[1:]) if isinstance(y, tuple) else state)
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
    handle.remove()
    return logits


class TestRecordAndRun:
    @pytest.mark.parametrize("name", FAMILIES + EXTRAS)
    def test_replays_the_model_exactly(self, name, windows):
        model = tiny(name)
        blocks = Decoder.of(model).blocks
        recording = capture_block_inputs(model, windows, micro_batch=2)
        assert [len(x) for x in recording.hidden] == [2, 2, 1]
        for i, (ids, x) in enumerate(zip(windows.split(2), recording.hidden, strict=True)):
            states, logits = own_pass(model, blocks, ids)
            with torch.no_grad():
                for block, calls, expected in zip(blocks, recording.calls, states, strict=True):
                    assert not torch.equal(x, expected)
                    x = run_block(block, x, calls.at(i, "cpu"))  # noqa: PLW2901 - the hidden state goes on
                    assert torch.equal(x, expected)
            assert torch.equal(logits_behind(model, blocks[-1], x, ids), logits)

    def test_works_in_bfloat16(self, windows):
        model = tiny("llama", dtype=torch.bfloat16)
        blocks = Decoder.of(model).blocks
        recording = capture_block_inputs(model, windows, micro_batch=5)
        x = recording.hidden[0]
        states, _ = own_pass(model, blocks, windows)
        for block, calls, expected in zip(blocks, recording.calls, states, strict=True):
            outputs = ActivationStore("cpu")
            collect_statistics(BlockPass(block, calls, ActivationStore("cpu", [x])), Products, outputs)
            (x,) = outputs
            assert x.dtype == torch.bfloat16
            assert torch.equal(x, expected)

    def test_sliding_and_global_blocks_keep_their_own_arguments(self, windows):
        calls = capture_block_inputs(tiny("gemma3_text"), windows, micro_batch=2).calls[:2]
        sliding, full = (each.at(0, "cpu").kwargs for each in calls)
        causal = SEQLEN * (SEQLEN + 1) // 2
        assert sliding["attention_mask"][0].sum() < causal
        assert full["attention_mask"] is None
        assert not torch.equal(sliding["position_embeddings"][0], full["position_embeddings"][0])

    def test_keeps_the_arguments_of_each_size(self, windows):
        calls = capture_block_inputs(tiny("bloom"), windows, micro_batch=2).calls[1]
        assert [len(calls.at(i, "cpu").kwargs["alibi"]) for i in range(3)] == [2 * 4, 2 * 4, 4]

    @pytest.mark.parametrize("name", ["llama", "falcon", "gemma3_text"])
    def test_computes_the_first_block_only(self, name, windows):
        model = tiny(name)
        expected = capture_block_inputs(model, windows, micro_batch=2)
        blocks = Decoder.of(model).blocks
        for block in blocks[1:]:
            block.to("meta")
        model.get_output_embeddings().register_forward_hook(lambda *_: pytest.fail("logits were computed"))
        found = capture_block_inputs(model, windows, micro_batch=2)
        assert all(map(torch.equal, found.hidden, expected.hidden))
        for calls, others in zip(found.calls, expected.calls, strict=True):
            assert len(calls) == len(others) == 3
            for i in range(3):
                torch.testing.assert_close(calls.at(i, "cpu").kwargs, others.at(i, "cpu").kwargs, rtol=0, atol=0)

    def test_computes_the_first_block_once_a_size(self, windows):
        model = tiny("llama")
        blocks = Decoder.of(model).blocks
        sizes = []
        blocks[0].mlp.register_forward_hook(lambda _, __, y: sizes.append(len(y)))
        recording = capture_block_inputs(model, windows.repeat(2, 1)[:9], micro_batch=2)
        assert [len(x) for x in recording.hidden] == [2, 2, 2, 2, 1]
        assert sizes == [2, 1]

    def test_leaves_the_model_as_it_was(self, windows):
        model = tiny("opt")
        with torch.no_grad():
            before = model(windows).logits
        capture_block_inputs(model, windows, micro_batch=2)
        with pytest.raises(IndexError):
            capture_block_inputs(model, windows + 1000, micro_batch=2)  # no such tokens
        assert not hooks_of(model)
        with torch.no_grad():
            assert torch.equal(model(windows).logits, before)

    def test_lets_gradients_through(self, windows):
        model = tiny("qwen2")
        blocks = Decoder.of(model).blocks
        recording = capture_block_inputs(model, windows, micro_batch=5)
        run_block(blocks[1], recording.hidden[0], recording.calls[1].at(0, "cpu")).square().mean().backward()
        assert all(p.grad is not None and p.grad.any() for p in blocks[1].parameters())

    @pytest.mark.parametrize("name", ["mistral", "bloom"])
    def test_takes_hidden_state_and_arguments_to_the_block(self, name, windows):
        model = tiny(name)
        blocks = Decoder.of(model).blocks
        recording = capture_block_inputs(model, windows, micro_batch=5)
        out = run_block(blocks[1].to("meta"), recording.hidden[0], recording.calls[1].at(0, "meta"))
        assert out.device.type == "meta"
        assert out.shape == recording.hidden[0].shape


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(6, 6)

    def forward(self, state, scale, *, shift=None):
        up = functional.gelu(self.up(state))
        return [state + scale * up + (0 if shift is None else shift), up[:, :1, :1]]


class Chain(nn.Module):
    """A decoder with habits of its own, overridden below."""

    def __init__(self, depth=3):
        super().__init__()
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_hidden_layers=depth))
        self.embed = nn.Embedding(97, 6)
        self.list = nn.ModuleList(Block() for _ in range(depth))

    def get_decoder(self):
        return self

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return None

    def order(self):
        return self.list

    def call(self, block, x, ids):  # noqa: ARG002 - overridden
        return block(x, 0.5)[0]

    def forward(self, ids, use_cache):
        assert not use_cache
        x = self.embed(ids)
        for block in self.order():
            x = self.call(block, x, ids)
        return x


class ByKeyword(Chain):
    def call(self, block, x, ids):
        return block(shift=torch.ones(len(ids), 1, 1), scale=0.5, state=x)[0]


class Twice(Chain):
    def order(self):
        return [*self.list, *self.list]


class Reversed(Chain):
    def order(self):
        return self.list[::-1]


class Short(Chain):
    def order(self):
        return self.list[:2]


class Unused(Chain):
    def order(self):
        return []


class Scaled(Chain):
    def call(self, block, x, ids):  # noqa: ARG002 - a Chain's call
        return 2 * block(x, 0.5)[0]


class ByText(Chain):
    def call(self, block, x, ids):
        return block(x, 0.5, shift=ids[..., None].float())[0]


class ByTextPositional(Chain):
    def call(self, block, x, ids):
        return block(x, ids[..., None].float())[0]


class ByState(Chain):
    def call(self, block, x, ids):  # noqa: ARG002 - a Chain's call
        return block(x, 0.5, shift=x.mean((1, 2), keepdim=True))[0]


class ByOther(Chain):
    def order(self):
        self.last = torch.ones(1)
        return self.list

    def call(self, block, x, ids):  # noqa: ARG002 - a Chain's call
        x, self.last = block(x, self.last)
        return x


class Flat(Chain):
    def call(self, block, x, ids):
        return block(x.flatten(0, 1), 0.5)[0].reshape(*ids.shape, 6)


class TestForeignModels:
    @pytest.mark.parametrize("kind", [Chain, ByKeyword, ByText, ByTextPositional])
    def test_replays_positional_and_keyword_arguments(self, kind, windows):
        model = kind()
        recording = capture_block_inputs(model, windows, micro_batch=3)
        with torch.no_grad():
            for i, (x, ids) in enumerate(zip(recording.hidden, windows.split(3), strict=True)):
                for block, calls in zip(model.list, recording.calls, strict=True):
                    x = run_block(block, x, calls.at(i, "cpu"))  # noqa: PLW2901 - the hidden state goes on
                assert torch.equal(x, model(ids, use_cache=False))

    @pytest.mark.parametrize(
        ("kind", "message"),
        [
            (Twice, "Block 0 is called where block 3 is due"),
            (Reversed, "Block 2 is called where block 0 is due"),
            (Short, "Block 2 is never called"),
            (Unused, "Block 0 is never called"),
            (Scaled, "changes the hidden state between blocks 0 and 1"),
            (ByState, "shift of block 1 depends on what the blocks before it compute"),
            (ByOther, "Argument 2 of block 1 depends on what the blocks before it compute"),
            (Flat, "Block 0 is not called with a hidden state of shape"),
        ],
    )
    def test_refuses_what_it_cannot_replay(self, kind, message, windows):
        model = kind()
        with pytest.raises(InputError, match=message):
            capture_block_inputs(model, windows, micro_batch=2)
        assert not hooks_of(model)


class TestDecoderBlocks:
    def test_names_the_list(self):
        model = tiny("opt")
        decoder = Decoder.of(model)
        assert decoder.name == "model.decoder.layers"
        assert decoder.blocks is model.model.decoder.layers

    def test_refuses_a_model_without_such_a_list(self):
        model = tiny("llama")
        model.config.num_hidden_layers = 7
        with pytest.raises(InputError, match="must have one list of 7 decoder blocks, but has 0"):
            Decoder.of(model)

    def test_refuses_two_such_lists(self):
        model = tiny("llama")
        model.model.others = nn.ModuleList(nn.Identity() for _ in range(3))
        with pytest.raises(InputError, match=r"list of 3 decoder blocks, but has 2: model\.layers, model\.others"):
            Decoder.of(model)

    def test_ignores_lists_within_blocks_and_outside_the_decoder(self):
        model = tiny("llama")
        model.tower = nn.ModuleList(nn.Identity() for _ in range(3))
        for block in model.model.layers:
            block.experts = nn.ModuleList(nn.Identity() for _ in range(3))
        assert Decoder.of(model).name == "model.layers"


class Plain(nn.Linear):
    def forward(self, input):  # noqa: A002 - torch's name
        return input @ self.weight.T + (0 if self.bias is None else self.bias)


class Router(nn.Linear):
    def forward(self, input):  # noqa: A002 - torch's name
        return super().forward(input).topk(1).indices


class Scaling(nn.Linear):
    def forward(self, input):  # noqa: A002 - torch's name
        return 2 * super().forward(input)


class Failing(nn.Linear):
    def forward(self, input):  # noqa: A002 - torch's name
        return self.no_such_thing(input)


class TestLinears:
    def test_takes_only_what_computes_a_plain_linear_map(self):
        kinds = {"a": nn.Linear, "b": Plain, "c": Router, "d": Scaling, "e": Failing, "f": nn.Identity}
        block = nn.ModuleDict({name: kind(5, 6, bias=name == "b") for name, kind in kinds.items()})
        block["g"] = Plain(5, 6, bias=False)
        assert list(compressible(block)) == ["a", "b", "g"]
        assert list(compressible(block.to("meta"))) == ["a", "b", "g"]

    def test_leaves_packed_weights_out(self):
        block = nn.ModuleDict({"packed": nn.Linear(8, 8), "quantised": nn.Linear(8, 8)})
        block["packed"].weight = nn.Parameter(torch.zeros(32, 1))
        block["quantised"].weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
        assert compressible(block) == {}

    def test_knows_layers_of_a_class_of_their_own(self):
        blocks = Decoder.of(tiny("falcon")).blocks
        assert type(next(iter(linears(blocks[0]).values()))) is not nn.Linear
        assert len(linears(blocks[0])) == 4


class TestNotCompressed:
    @pytest.mark.parametrize("name", FAMILIES + EXTRAS)
    def test_accounts_for_every_parameter_once(self, name):
        model = tiny(name)
        compressed = dict(Decoder.of(model).layers())
        rows = not_compressed(model, compressed.keys())
        inside = sum(w.read().numel() + (0 if w.bias is None else w.bias.numel()) for w in compressed.values())
        assert inside + sum(row.parameters for row in rows) == sum(p.numel() for p in model.parameters())
        assert len({row.name for row in rows}) == len(rows)
        assert all(row.parameters > 0 for row in rows)

    def test_says_why(self):
        model = tiny("qwen2")
        rows = {row.name: row for row in not_compressed(model, ["model.layers.0.self_attn.q_proj"])}
        assert rows["model.embed_tokens"].why == "embedding"
        assert rows["lm_head"].why == "output head"
        assert rows["model.layers.2.input_layernorm"].why == "norm or bias"
        assert rows["model.layers.0.self_attn.k_proj"].why == "linear layer that was not selected"
        assert rows["model.layers.0.self_attn.k_proj"].parameters == 16 * 32 + 16
        assert "model.layers.0.self_attn.q_proj" not in rows

    def test_counts_a_tied_head_once(self):
        rows = {row.name: row for row in not_compressed(tiny("gemma2"), [])}
        assert rows["model.embed_tokens"].why == "embedding and output head, tied"
        assert "lm_head" not in rows

    @pytest.mark.parametrize(
        ("name", "layer", "why"),
        [
            ("mixtral", "model.layers.1.mlp.experts", "experts that were not selected"),
            ("mixtral", "model.layers.1.mlp.gate", "weights of MixtralTopKRouter, not a plain linear layer"),
        ],
    )
    def test_reports_weights_that_are_no_linear_layer(self, name, layer, why):
        rows = {row.name: row for row in not_compressed(tiny(name), [])}
        assert rows[layer].why == why

    def test_counts_the_experts_of_a_parameter_that_are_left(self):
        model = tiny("mixtral")
        name = "model.layers.1.mlp.experts"
        compressed = [f"{name}.down_proj.{number}" for number in range(4)] + [f"{name}.gate_up_proj.2"]
        rows = {row.name: row for row in not_compressed(model, compressed)}
        assert rows[name].parameters == model.get_parameter(f"{name}.gate_up_proj").numel() * 3 // 4


@pytest.fixture
def second_block(windows):
    """A function from a family's name to its second block, the block's calls and its inputs."""

    def make(name, **options):
        model = tiny(name, **options)
        blocks = Decoder.of(model).blocks
        recording = capture_block_inputs(model, windows, micro_batch=2)
        return BlockPass(blocks[1], recording.calls[1], recording.hidden, "block")

    return make


class Experts(nn.Module):
    """Sends each micro-batch to the experts named by ``plan``; ``apart`` ones read a copy of their own."""

    def __init__(self, plan):
        super().__init__()
        self.experts = nn.ModuleDict({name: nn.Linear(6, 6) for name in "abcd"})
        self.plan = iter(plan)

    def forward(self, x):
        together, apart = next(self.plan)
        return sum(self.experts[n](x) for n in together) + sum(self.experts[n](x + 1) for n in apart)


class TestObserve:
    @pytest.mark.parametrize("name", FAMILIES + EXTRAS)
    def test_gives_outputs_and_statistics_in_one_pass(self, name, second_block):
        through = second_block(name)
        outputs = ActivationStore("cpu")
        seen = collect_statistics(through, Products, outputs)
        with torch.no_grad():
            for i, (x, y) in enumerate(zip(through.hidden, outputs, strict=True)):
                assert torch.equal(y, run_block(through.block, x, through.call(i)))
        expected = products_of_each(through)
        assert seen.owner.keys() == expected.keys()
        for layer, owner in seen.owner.items():
            assert torch.equal(seen.statistics[owner].H, expected[layer].H)
        assert set(seen.statistics) == set(seen.owner.values())
        alone = collect_statistics(through, Products)
        assert alone.owner == seen.owner
        assert all(torch.equal(statistic.H, seen.statistics[name].H) for name, statistic in alone.statistics.items())
        assert not hooks_of(through.block)

    @pytest.mark.parametrize(("outputs", "times"), [(None, 1), (ActivationStore("cpu"), 3)])
    def test_ends_a_pass_where_nothing_is_left_to_see(self, outputs, times, second_block):
        through = second_block("llama")
        assert len(through.hidden) == 3
        seen = []
        through.block.mlp.down_proj.register_forward_hook(lambda *_: seen.append(1))
        collect_statistics(through, Products, outputs)
        assert len(seen) == times  # the first pass shows which linear is the last

    def test_sees_to_the_end_what_is_called_more_than_once(self):
        plan = [("ab", "a")] * 3  # the last call of a comes after every linear was called
        block = Experts(plan)
        through = BlockPass(block, bare_calls(3), ActivationStore("cpu", torch.randn(3, 2, 4, 6)))
        block.experts = nn.ModuleDict({name: block.experts[name] for name in "ab"})
        seen = collect_statistics(through, Products)
        block.plan = iter(plan)
        for layer, expected in products_of_each(through).items():
            assert torch.equal(seen.statistics[seen.owner[layer]].H, expected.H)

    def test_names_what_is_not_finite_in_a_pass_that_it_ends(self, second_block):
        through = second_block("llama")
        hidden = list(through.hidden)
        hidden[1] = hidden[1].clone().index_fill_(1, torch.tensor([2]), torch.inf)
        with pytest.raises(InputError, match=r"the input of self_attn\.q_proj is not finite"):
            collect_statistics(replace(through, hidden=ActivationStore("cpu", hidden)), Products)

    def test_shares_the_statistic_of_a_shared_input(self, second_block):
        seen = collect_statistics(second_block("llama"), Products)
        assert seen.owner == {
            "self_attn.q_proj": "self_attn.q_proj",
            "self_attn.k_proj": "self_attn.q_proj",
            "self_attn.v_proj": "self_attn.q_proj",
            "self_attn.o_proj": "self_attn.o_proj",
            "mlp.gate_proj": "mlp.gate_proj",
            "mlp.up_proj": "mlp.gate_proj",
            "mlp.down_proj": "mlp.down_proj",
        }

    def test_shares_it_between_parallel_attention_and_mlp(self, second_block):
        owner = collect_statistics(second_block("falcon_alibi"), Products).owner
        assert owner["mlp.dense_h_to_4h"] == owner["self_attention.query_key_value"]

    @pytest.mark.parametrize(
        ("plan", "owner"),
        [
            ([("ab", ""), ("ab", ""), ("ab", "")], {"a": "a", "b": "a"}),
            ([("ab", ""), ("a", "b"), ("ab", "")], {"a": "a", "b": "b"}),
            ([("abc", ""), ("a", ""), ("abc", "")], {"a": "a", "b": "b", "c": "b"}),
            ([("abc", ""), ("bc", ""), ("abc", "")], {"a": "a", "b": "b", "c": "b"}),
            ([("a", ""), ("ab", "c"), ("abc", "")], {"a": "a", "b": "b", "c": "c"}),
            ([("", "a"), ("a", ""), ("a", "")], {"a": "a"}),
        ],
    )
    def test_separates_layers_as_soon_as_their_inputs_differ(self, plan, owner):
        block = Experts(plan)
        through = BlockPass(block, bare_calls(3), ActivationStore("cpu", torch.randn(3, 2, 4, 6)))
        seen = collect_statistics(through, Products)
        assert seen.owner == {f"experts.{name}": f"experts.{own}" for name, own in owner.items()}
        block.plan = iter(plan)
        for layer, expected in products_of_each(through).items():
            assert torch.equal(seen.statistics[seen.owner[layer]].H, expected.H)

    @pytest.mark.parametrize(
        ("broken", "named"),
        [
            ("self_attn.k_proj", "a weight of self_attn.k_proj"),
            ("mlp.down_proj", "a weight of mlp.down_proj"),
            ("post_attention_layernorm", "the input of mlp.gate_proj"),
        ],
    )
    def test_names_the_layer_where_numbers_go_wrong(self, broken, named, second_block):
        through = second_block("llama")
        with torch.no_grad():
            through.block.get_submodule(broken).weight[3] = torch.nan
        with pytest.raises(InputError, match=f"block 3: {named} is not finite .* --dtype float32"):
            collect_statistics(replace(through, label="block 3"), Products)
        assert not hooks_of(through.block)

    def test_names_the_layer_whose_input_overflows(self, second_block):
        through = second_block("llama", dtype=torch.float16)
        with torch.no_grad():
            through.block.mlp.up_proj.weight *= 1e4
            through.block.mlp.gate_proj.weight *= 1e3
        with pytest.raises(InputError, match=r"the input of mlp\.down_proj is not finite"):
            collect_statistics(through, Products)

    def test_refuses_inputs_that_change_under_its_eyes(self):
        class InPlace(nn.Module):
            def __init__(self):
                super().__init__()
                self.up = nn.Linear(6, 6)

            def forward(self, x):
                x += self.up(x)
                return x

        block = InPlace()
        with pytest.raises(InputError, match="block 3 changes the input of up in place"):
            collect_statistics(
                BlockPass(block, bare_calls(1), ActivationStore("cpu", [torch.ones(2, 4, 6)]), "block 3"), Products
            )
        assert not hooks_of(block)

    def test_names_the_output_if_every_layer_is_sound(self, second_block):
        through = second_block("gemma2")
        with torch.no_grad():
            through.block.post_feedforward_layernorm.weight[0] = torch.inf
        with pytest.raises(InputError, match="block: the output is not finite"):
            collect_statistics(through, Products)
