"""S while it is trained: the same numbers, gradients of its kept entries alone, and nothing that is waited for."""

import pytest
import torch

from families import linears, tiny
from sparlow import compress
from sparlow.linalg.patterns import parse_pattern
from sparlow.model.artefact.layers import SparseLowRankLinear
from sparlow.model.forward.block_pass import BlockPass
from sparlow.model.forward.capture import capture_block_inputs
from sparlow.model.forward.decoder import Decoder
from sparlow.model.training import loop
from sparlow.model.training.block_matching import BlockOutputs, match
from sparlow.model.training.loop import MicroBatches, TrainingPlan
from sparlow.model.training.trained_parts import KeptValues
from sparlow.recipe.recipe import GIVEN_WINDOWS, Recipe
from waits import Counting

EXPERTS = {"nonzero", "_local_scalar_dense"}  # that each looks for its tokens


def sparse(pattern, shape=(6, 16)):
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return W * parse_pattern(pattern).mask(W.abs())


@pytest.mark.parametrize("pattern", ["2:4", "0.5", "dense", "1:16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_s_comes_out_as_it_went_in(pattern, dtype):
    S = sparse(pattern).to(dtype)
    for given in (S, S.T.contiguous().T, torch.zeros_like(S)):
        part = KeptValues(given)
        assert torch.equal(part(), given.float())
        assert torch.equal(part.result(dtype), given)
        assert part.values.dtype == torch.float32
        assert part.positions.dtype == torch.int32  # half of what an index of torch takes
        assert len(part.values) == int((given != 0).sum())
        assert list(part.state_dict()) == ["values"]  # as states of training are kept


def test_gradients_are_those_of_the_kept_entries_in_their_order():
    S, outer = sparse("2:4"), torch.randn(6, 16)
    part = KeptValues(S)
    (part() * outer).sum().backward()
    assert torch.equal(part.values.grad, outer[S != 0])
    part.values.grad = None
    (part() * outer).T.contiguous().T.sum().backward()
    assert torch.equal(part.values.grad, outer[S != 0])


@pytest.fixture
def steps(monkeypatch):
    """What torch is asked to do in each step of training."""
    counts, step = [], loop._Training._step

    def counted(self, chosen, done):
        with Counting() as counting:
            loss = step(self, chosen, done)
        counts.append(counting)
        return loss

    monkeypatch.setattr(loop._Training, "_step", counted)
    return counts


def test_a_step_of_training_waits_for_nothing(steps):
    model = tiny("llama")
    block = Decoder.of(model).blocks[0]
    windows = torch.randint(2, 97, (8, 16), generator=torch.Generator().manual_seed(1))
    recording = capture_block_inputs(model, windows, micro_batch=4)
    for name, linear in linears(block).items():
        W = linear.weight.detach()
        S = W * parse_pattern("2:4").mask(W.abs())
        block.set_submodule(name, SparseLowRankLinear(S, W[:, :2] * 0.1, W[:2] * 0.1, linear.bias))
    plan = TrainingPlan(epochs=2, lr=1e-3, low_rank_lr=1e-3, batch=4, patience=0)
    through = BlockPass(block, recording.calls[0], recording.hidden)
    match(through, MicroBatches(recording.hidden, recording.hidden), BlockOutputs(relative=True, from_dense=True), plan)
    assert len(steps) == 4
    for counting in steps:  # forward and backward of each layer: they are seen
        assert counting.found["scatter_"] == counting.found["index_select"] == 7
        assert not counting.waits


@pytest.mark.parametrize("preset", ["blocks", "logits"])
@pytest.mark.parametrize(("name", "values"), [("llama", "int4"), ("llama", "int3"), ("mixtral", "model")])
def test_neither_do_grids_codes_and_experts(name, values, preset, steps):
    """An expert looks for its tokens, which is transformers' own way; nothing of ours does."""
    recipe = Recipe(
        values=values,
        rank=4,
        factors="auto" if values == "model" else "int8",
        samples=4,
        seqlen=16,
        algorithm="3basil",
        options={"effort": 0.1, "max_steps": 5},
        calibration=GIVEN_WINDOWS,
        match=True,
        match_preset=preset,
        match_epochs=1,
    )
    windows = torch.randint(2, 97, (4, 16), generator=torch.Generator().manual_seed(1))
    compress(tiny(name, blocks=1), recipe, calibration=windows, evaluate=(), inplace=True, force=True, device="cpu")
    assert steps
    for counting in steps:
        assert counting.found["mm"] + counting.found["addmm"] + counting.found["bmm"] > 0
        assert not counting.waits.keys() - (EXPERTS if name == "mixtral" else set())
