"""What layers read does not depend on how the text is cut into micro-batches, whatever blocks give each other."""

import pytest
import torch

from families import BY_TEXT, EXTRAS, FAMILIES, STRUCTURES, tiny
from sparlow.linalg.gram import GramAccumulator
from sparlow.model.forward.activation_store import ActivationStore
from sparlow.model.forward.block_pass import BlockPass
from sparlow.model.forward.capture import capture_block_inputs
from sparlow.model.forward.decoder import Decoder
from sparlow.model.forward.input_statistics import collect_statistics

WINDOWS = torch.randint(2, 97, (6, 20), generator=torch.Generator().manual_seed(1))  # longer than the sliding windows


def grams(model, micro_batch):
    """Σ x xᵀ of what every layer reads by its full name, and what leaves the last block."""
    decoder = Decoder.of(model)
    recording = capture_block_inputs(model, WINDOWS, micro_batch=micro_batch)
    hidden, found = recording.hidden, {}
    for i, calls in enumerate(recording.calls):
        outputs = ActivationStore("cpu")
        seen = collect_statistics(BlockPass(decoder.blocks[i], calls, hidden), GramAccumulator, outputs)
        for name, owner in seen.owner.items():
            found[decoder.layer_name(i, name)] = seen.statistics[owner].second_moment(len(WINDOWS))
        hidden = outputs
    return found, torch.cat(list(hidden))


@pytest.mark.parametrize("family", FAMILIES + EXTRAS + BY_TEXT + STRUCTURES)
def test_statistics_of_three_micro_batches_equal_those_of_one_pass(family):
    model = tiny(family)
    (one, state), (three, same_state) = grams(model, 6), grams(model, 2)
    assert one.keys() == three.keys()
    assert one
    torch.testing.assert_close(same_state, state, rtol=1e-4, atol=1e-4 * state.abs().max().item())
    for name, H in one.items():
        assert (three[name] - H).norm() <= 1e-4 * H.norm(), name
