"""Laws of training what lies on a grid: it stays there, codes stay, what was judged is what is stored."""

import copy
from dataclasses import replace

import pytest
import torch

import sparlow
from coded import free, random_factors, random_grid, random_sparse, two_of_four
from families import linears, save_tiny, tiny
from samples import few_of
from sparlow.errors import RunError
from sparlow.linalg.grid import FactorScales
from sparlow.model.artefact.layers import SparseLowRankLinear, compressed_layers
from sparlow.model.artefact.packing import pack_module
from sparlow.model.artefact.stored_form import StoredForm, Weight, pack_weight, unpack_weight
from sparlow.model.forward.activation_store import ActivationStore
from sparlow.model.forward.block_pass import BlockPass
from sparlow.model.forward.capture import capture_block_inputs
from sparlow.model.forward.decoder import Decoder
from sparlow.model.forward.input_statistics import collect_statistics
from sparlow.model.training import distillation
from sparlow.model.training.block_matching import BlockOutputs, loss_on, match
from sparlow.model.training.loop import MicroBatches, TrainingPlan
from sparlow.model.training.packed_layer import Packed, round_through
from sparlow.model.training.trained_parts import Int8LowRank, KeptValues, LowRank, OnGrid
from sparlow.recipe.recipe import Recipe
from sparlow.run.journal import Journal
from sparlow.run.verify import verify_artefact

WINDOWS = torch.randint(2, 97, (10, 16), generator=torch.Generator().manual_seed(1))
PLAN = TrainingPlan(epochs=4, lr=2e-3, low_rank_lr=2e-3, batch=4, patience=0)
PLAIN = BlockOutputs(relative=False, from_dense=True)
BF16 = torch.bfloat16
MASKS = {"dense": lambda _: None, "2:4": two_of_four, "free": free}


class Nothing:
    def __init__(self, *_):
        pass

    def add(self, _):
        pass


def coded_layer(shape, values, mask, *, rank=2, int8=True, dtype=BF16, bias=None, seed=0):
    """A layer of random codes in float32, as it is computed with, and how it is stored."""
    grid = random_grid(shape, values, masked=mask is not None, dtype=dtype, seed=seed)
    S = random_sparse(shape, grid, mask=mask, dtype=dtype, seed=seed)
    U, V, scales = random_factors(shape, rank, dtype=dtype, seed=seed)
    layer = SparseLowRankLinear(S.float(), U.float(), V.float(), bias)
    layer.stored = StoredForm(grid, scales if int8 and rank else None, dtype)
    return layer


def problem(values="int3", pattern="2:4", **options):
    """A block of codes, its calls, inputs, and the dense block's outputs."""
    model = tiny("llama")
    block = Decoder.of(model).blocks[0]
    recording = capture_block_inputs(model, WINDOWS, micro_batch=4, apart=2)
    outputs = ActivationStore("cpu")
    collect_statistics(BlockPass(block, recording.calls[0], recording.hidden), Nothing, outputs)
    for seed, (name, linear) in enumerate(linears(block).items()):
        shape = tuple(linear.weight.shape)
        mask = MASKS[pattern](shape)
        block.set_submodule(name, coded_layer(shape, values, mask, bias=linear.bias, seed=seed, **options))
    return BlockPass(block, recording.calls[0], recording.hidden), MicroBatches(recording.hidden, outputs)


def codes(block):
    return {
        name: layer.stored.values.encode(layer.S).masked_fill(layer.S == 0, 255)
        for name, layer in compressed_layers(block).items()
    }


def read_again(layer):
    """The layer's numbers as a file gives them back."""
    found = pack_module(layer)
    weight, form = unpack_weight(found.tensors, tuple(layer.S.shape), found.grid, found.dtype)
    return Weight(*(part.float() for part in weight)), form


EVERY = [(values, pattern, int8) for values in ("int4", "int3", "int2", "int8") for pattern in MASKS for int8 in (1, 0)]


@pytest.mark.parametrize(
    ("values", "pattern", "int8"), few_of(EVERY, ("int4", "dense", 1), ("int3", "2:4", 1), ("int2", "free", 0))
)
def test_what_lies_on_a_grid_stays_there_and_is_what_was_judged(values, pattern, int8):
    through, data = problem(values, pattern, int8=bool(int8))
    before, kept = codes(through.block), loss_on(through, data, PLAIN)
    found = match(through, data, PLAIN, PLAN)
    round_through(through.block, BF16)
    assert found.loss_before == pytest.approx(kept, rel=1e-5)
    assert found.loss_after < 0.99 * found.loss_before
    for name, after in codes(through.block).items():
        assert torch.equal(after, before[name])
    for layer in compressed_layers(through.block).values():
        packing = pack_module(layer)
        assert packing.lost == ()
        assert packing.grid.name == values
        assert packing.int8_factors == bool(int8)
        weight, form = read_again(layer)
        for part, own in zip(weight, (layer.S, layer.U, layer.V), strict=True):
            assert torch.equal(part, own)
        assert torch.equal(form.values.scale, layer.stored.values.scale)
    # of the norms and of factors in floats nothing is judged as it is rounded in the end
    assert loss_on(through, data, PLAIN) == pytest.approx(found.loss_after, rel=0.02)


def test_a_training_without_any_step_leaves_every_bit():
    through, data = problem()
    before = copy.deepcopy(through.block)
    still = replace(PLAN, lr=3.0, low_rank_lr=3.0, epochs=1)  # it only harms
    found = match(through, data, PLAIN, still)
    assert found.loss_after == found.loss_before
    for name, layer in compressed_layers(through.block).items():
        other = compressed_layers(before)[name]
        for part in ("S", "U", "V"):
            assert torch.equal(getattr(layer, part), getattr(other, part))
        assert torch.equal(layer.stored.values.scale, other.stored.values.scale)
        assert torch.equal(layer.stored.factors.U, other.stored.factors.U)
        assert torch.equal(layer.stored.factors.V, other.stored.factors.V)


@pytest.mark.parametrize("values", ["int8", "int4", "int3"])
@pytest.mark.parametrize("pattern", MASKS)
def test_before_the_first_step_a_layer_computes_what_it_did(values, pattern):
    mask = MASKS[pattern]((24, 32))
    layer = coded_layer((24, 32), values, mask)
    S, product = layer.S.detach().clone(), layer.low_rank_weight()
    whole = Packed(layer)
    assert torch.equal(whole.sparse(), S)
    torch.testing.assert_close(whole.low_rank(), product, rtol=1e-6, atol=0)
    assert layer.S.numel() == 0  # it was let go
    whole.unpack_into(layer)
    assert torch.equal(layer.S, S)


def test_a_scale_has_the_gradient_of_all_that_it_scales():
    layer = coded_layer((6, 40), "int3", two_of_four((6, 40)))
    S, scale = layer.S.detach().clone(), layer.stored.values.scale.float()
    G = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    whole = Packed(layer)
    (whole.sparse() * G).sum().backward()
    expected = torch.stack([part.sum(1) for part in (G * S).split(16, 1)], 1)  # dS/dratio is S itself, but for rounding
    assert expected.shape == scale.shape
    torch.testing.assert_close(whole.sparse.ratio.grad, expected, rtol=2e-2, atol=2e-2)


def test_rounded_factors_have_the_gradients_of_the_numbers_they_stand_for():
    layer = coded_layer((6, 40), "int3", None)
    U, V = layer.U.detach().clone(), layer.V.detach().clone()
    G = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    whole = Packed(layer)
    lengths = whole.low_rank.lengths
    (whole.low_rank() * G).sum().backward()
    torch.testing.assert_close(whole.low_rank.U.grad / lengths, G @ V.T)
    torch.testing.assert_close(whole.low_rank.V.grad * lengths[:, None], U.T @ G)


def test_a_scale_ends_between_half_and_twice_of_what_it_was_and_no_kept_value_becomes_zero():
    layer = coded_layer((6, 40), "int3", two_of_four((6, 40)))
    before, mask = layer.stored.values.scale.float(), layer.S != 0
    whole = Packed(layer)
    with torch.no_grad():
        whole.sparse.ratio.copy_(torch.linspace(-5, 5, whole.sparse.ratio.numel()).view_as(whole.sparse.ratio))
    whole.unpack_into(layer)
    ratio = layer.stored.values.scale.float() / before
    assert ratio.min() == 0.5
    assert ratio.max() == 2
    assert torch.equal(layer.S != 0, mask)
    assert pack_module(layer).lost == ()


@pytest.mark.parametrize("factor", [0.3, 1.7])
def test_a_factor_that_left_its_scale_gets_another(factor):
    layer = coded_layer((96, 40), "int3", None)
    before = layer.stored.factors
    whole = Packed(layer)
    with torch.no_grad():
        whole.low_rank.U[:, 0] *= factor
    whole.unpack_into(layer)
    after = layer.stored.factors
    assert after.U[0].item() == pytest.approx(factor * before.U[0].item(), rel=0.06)
    assert after.U[1] == before.U[1]
    assert torch.equal(after.V, before.V)
    assert pack_module(layer).lost == ()


def test_a_factor_that_is_zero_stays_so():
    S, grid = torch.ones(4, 16), None
    layer = SparseLowRankLinear(S, torch.zeros(4, 2), torch.zeros(2, 16))
    layer.stored = StoredForm(grid, FactorScales(torch.zeros(2, dtype=BF16), torch.zeros(2, dtype=BF16)), torch.float32)
    whole = Packed(layer)
    whole.low_rank().sum().backward()
    whole.unpack_into(layer)
    assert not layer.U.any()
    assert not layer.V.any()
    assert pack_module(layer).lost == ()


def test_values_in_floats_beside_factors_in_int8_and_the_reverse():
    for form, kinds in (("factors", (KeptValues, Int8LowRank)), ("values", (OnGrid, LowRank))):
        layer = coded_layer((8, 32), "int4", two_of_four((8, 32)))
        layer.stored = StoredForm(dtype=BF16, **{form: getattr(layer.stored, form)})
        whole = Packed(layer)
        assert (type(whole.sparse), type(whole.low_rank)) == kinds


def test_what_is_not_on_its_grid_is_trained_in_floats_and_packing_says_so():
    layer = coded_layer((8, 32), "int4", None)
    with torch.no_grad():
        layer.S[0, 0] *= 1.01
    whole = Packed(layer)
    assert isinstance(whole.sparse, KeptValues)
    whole.unpack_into(layer)
    assert pack_module(layer).lost == ("values",)


def test_a_block_has_its_numbers_after_a_failure_too():
    through, data = problem()
    before = {name: layer.S.detach().clone() for name, layer in compressed_layers(through.block).items()}
    spoilt = MicroBatches(through.hidden, [torch.full_like(x, torch.nan) for x in through.hidden])
    with pytest.raises(RunError, match="cannot begin"):
        match(through, spoilt, PLAIN, PLAN)
    for name, layer in compressed_layers(through.block).items():
        assert torch.equal(layer.S, before[name])
        assert pack_module(layer).lost == ()
    del data


def test_a_layer_that_was_trained_can_be_copied_packed_and_trained_again():
    through, data = problem("int2", "dense")
    first = match(through, data, PLAIN, replace(PLAN, epochs=1))
    block = copy.deepcopy(through.block)
    second = match(replace(through, block=block), data, PLAIN, replace(PLAN, epochs=1))
    assert second.loss_before == pytest.approx(first.loss_after, rel=1e-3)
    assert second.loss_after <= second.loss_before


# All blocks together


def chain_of(model, recording):
    return distillation._Chain(list(Decoder.of(model).blocks), recording.calls)


def test_of_a_chain_only_what_enters_the_blocks_is_kept_for_gradients():
    model = tiny("llama")
    recording = capture_block_inputs(model, WINDOWS, micro_batch=2)
    kept, inside = [], []
    for block in Decoder.of(model).blocks:
        block.mlp.act_fn.register_forward_hook(lambda _m, _x, y: inside.append(y.numel()))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        left = chain_of(model, recording)(0, recording.hidden[0])
    passes = len(inside)
    assert passes == len(Decoder.of(model).blocks)
    assert sum(kept) <= passes * recording.hidden[0].numel()
    left.sum().backward()
    assert len(inside) == 2 * passes  # each was computed once more


@pytest.mark.parametrize(
    "family", few_of(["llama", "gemma2", "gemma3n_text", "gemma4_text", "mamba2", "mixtral"], "llama")
)
def test_gradients_of_a_chain_are_those_of_one_that_keeps_everything(family, monkeypatch):
    found = []
    for again in (True, False):
        model = tiny(family)
        recording = capture_block_inputs(model, WINDOWS, micro_batch=2)
        if not again:
            monkeypatch.setattr(distillation, "computed_again", lambda run, x, **_: run(x))
        left = chain_of(model, recording)(0, recording.hidden[0])
        left.square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())


# In a run


def run(folder, out, **changes):
    recipe = Recipe(rank=2, values="int3", pattern="4:8", options={"effort": 0.1}, match=True, match_lr=1e-3, seed=3)
    options = {"calibration": WINDOWS, "evaluate": (), "out": out, "inplace": out is None, "force": True}
    return sparlow.compress(folder, recipe.changed(match_epochs=2).changed(**changes), **options)


def same_shards(a, b):
    names = {path.name for path in a.glob("*.safetensors")}
    assert names == {path.name for path in b.glob("*.safetensors")}
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


RUNS = [
    (dtype, preset, changes)
    for dtype in (BF16, torch.float32, torch.float16)
    for preset in ("blocks", "logits")
    for changes in (
        {},
        {"values": "int4", "pattern": "dense"},
        {"values": "int2", "factors": "model"},
        {"values": "model", "factors": "int8"},
        {"algorithm": "sparsegpt", "rank": None, "options": {}, "pattern": "dense"},
    )
]


@pytest.mark.parametrize(("dtype", "preset", "changes"), few_of(RUNS, RUNS[0], RUNS[13]))
def test_a_run_packs_what_it_trained_on_its_grid(dtype, preset, changes, tmp_path):
    save_tiny("llama", tmp_path / "model", dtype=dtype)
    report = run(tmp_path / "model", tmp_path / "out", match_preset=preset, **changes)
    plain = run(tmp_path / "model", tmp_path / "plain", match=False, **changes)
    assert report.bytes == plain.bytes
    assert not [warning for warning in report.warnings if "grid" in warning]
    rows = report.matching or [report.distillation]
    assert all(row["loss_after"] <= row["loss_before"] for row in rows)
    assert any(row["loss_after"] < row["loss_before"] for row in rows)
    assert verify_artefact(tmp_path / "out") == []
    layers = compressed_layers(sparlow.load(tmp_path / "out"))
    assert len(layers) == len(report.layers)
    for layer in layers.values():
        assert pack_module(layer).lost == ()
        assert layer.stored is not None


@pytest.mark.parametrize("preset", few_of(["blocks", "logits"], "logits"))
def test_a_model_in_memory_has_what_a_directory_has(preset, tmp_path):
    save_tiny("llama", tmp_path / "model")
    run(tmp_path / "model", tmp_path / "out", match_preset=preset)
    model = tiny("llama")
    run(model, None, match_preset=preset)
    there, here = compressed_layers(sparlow.load(tmp_path / "out")), compressed_layers(model)
    for name, layer in here.items():
        assert torch.equal(layer.S, there[name].S), name
        assert torch.equal(layer.U, there[name].U), name
        assert torch.equal(layer.V, there[name].V), name
        assert pack_weight(Weight(layer.S, layer.U, layer.V), layer.stored).lost == ()


@pytest.mark.parametrize("kept", few_of([1, 5, 7, 10], 7))  # five steps an epoch
def test_a_run_that_is_killed_within_the_training_goes_on_to_the_same_bits(kept, tmp_path, monkeypatch):
    save_tiny("llama", tmp_path / "model", dtype=BF16)
    whole = run(tmp_path / "model", tmp_path / "whole")
    monkeypatch.setattr("sparlow.model.training.resume_state.EVERY", 0)
    count, keep = [], Journal.keep_training

    def spy(journal, tensors):
        keep(journal, tensors)
        count.append(journal.training.name)
        if len(count) == kept:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "keep_training", spy)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "model", tmp_path / "out")
    again = run(tmp_path / "model", tmp_path / "out")
    assert count == [f"training-{i}.safetensors" for i in range(1, 11)]  # no step was done twice
    assert same_shards(tmp_path / "whole", tmp_path / "out")
    assert {**again.distillation, "seconds": 0} == {**whole.distillation, "seconds": 0}


def test_a_run_that_is_killed_between_blocks_goes_on_to_the_same_bits(tmp_path):
    save_tiny("llama", tmp_path / "model", dtype=BF16)
    run(tmp_path / "model", tmp_path / "whole", match_preset="blocks")
    recipe = Recipe.from_file(tmp_path / "whole" / "recipe.toml")

    def stop(step):
        if step.stage == "blocks" and step.done == 1:
            raise KeyboardInterrupt

    options = {"calibration": WINDOWS, "evaluate": (), "out": tmp_path / "out"}
    with pytest.raises(KeyboardInterrupt):
        sparlow.compress(tmp_path / "model", recipe, notify=stop, **options)
    run(tmp_path / "model", tmp_path / "out", match_preset="blocks")
    assert same_shards(tmp_path / "whole", tmp_path / "out")


def test_a_state_of_other_parameters_is_left_alone(tmp_path, monkeypatch):
    save_tiny("llama", tmp_path / "model", dtype=BF16)
    run(tmp_path / "model", tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("sparlow.model.training.resume_state.EVERY", 0)
        keep = Journal.keep_training

        def renamed(journal, tensors):
            keep(journal, {name.replace("now.", "now.old."): tensor for name, tensor in tensors.items()})
            raise KeyboardInterrupt

        patch.setattr(Journal, "keep_training", renamed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "model", tmp_path / "out")
    run(tmp_path / "model", tmp_path / "out")
    assert same_shards(tmp_path / "whole", tmp_path / "out")
