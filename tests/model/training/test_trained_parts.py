"""S while it is trained: the same numbers, gradients of its kept entries alone, and nothing that is waited for."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from families import linears, tiny
from sparlow.linalg.patterns import parse_pattern
from sparlow.model.artefact.layers import SparseLowRankLinear
from sparlow.model.forward.block_pass import BlockPass
from sparlow.model.forward.capture import capture_block_inputs
from sparlow.model.forward.decoder import Decoder
from sparlow.model.training import loop
from sparlow.model.training.block_matching import BlockOutputs, match
from sparlow.model.training.loop import MicroBatches, TrainingPlan
from sparlow.model.training.trained_parts import KeptValues

# What makes an accelerator wait: a number that Python looks at, or a result as large as the data say
WAITS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "masked_scatter",
    "masked_scatter_",
    "_unique2",
    "is_nonzero",
}


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


class Counting(TorchDispatchMode):
    """Counts what torch is asked to do."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def test_a_step_of_training_waits_for_nothing(monkeypatch):
    model = tiny("llama")
    block = Decoder.of(model).blocks[0]
    windows = torch.randint(2, 97, (8, 16), generator=torch.Generator().manual_seed(1))
    recording = capture_block_inputs(model, windows, micro_batch=4)
    for name, linear in linears(block).items():
        W = linear.weight.detach()
        S = W * parse_pattern("2:4").mask(W.abs())
        block.set_submodule(name, SparseLowRankLinear(S, W[:, :2] * 0.1, W[:2] * 0.1, linear.bias))
    counts, step = [], loop._Training._step

    def counted(self, chosen, done):
        with Counting() as counting:
            loss = step(self, chosen, done)
        counts.append(counting.found)
        return loss

    monkeypatch.setattr(loop._Training, "_step", counted)
    plan = TrainingPlan(epochs=2, lr=1e-3, low_rank_lr=1e-3, batch=4, patience=0)
    through = BlockPass(block, recording.calls[0], recording.hidden)
    match(through, MicroBatches(recording.hidden, recording.hidden), BlockOutputs(relative=True, from_dense=True), plan)
    assert len(counts) == 4
    for found in counts:
        assert found["scatter_"] == found["index_select"] == 7  # forward and backward of each layer: they are seen
        assert not WAITS & found.keys()
