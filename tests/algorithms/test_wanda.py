import torch

import oracles
from sparlow.algorithms import find, solve
from sparlow.linalg.gram import Gram
from sparlow.linalg.patterns import NM, Unstructured


def pruned(W, gram, pattern):
    algorithm, _ = find("wanda")
    return solve(algorithm, W, gram, pattern, 0, {}).S


def test_scores_are_weight_times_input_norm():
    W, H = oracles.problem(24, 32, 5)
    W, H = torch.as_tensor(W), torch.as_tensor(H)
    gram = Gram.damped(H)
    scores = W.abs() * gram.H.diagonal().sqrt()
    for row, kept in zip(scores, pruned(W, gram, Unstructured(0.5)) != 0, strict=True):
        assert kept.sum() == 16
        assert row[kept].min() > row[~kept].max()  # compared within the row
    groups, kept = scores.reshape(-1, 4), (pruned(W, gram, NM(2, 4)) != 0).reshape(-1, 4)
    assert torch.equal(kept, oracles.nm_mask(groups, 2, 4).reshape(-1, 4))


def test_a_loud_input_saves_its_weights_and_no_weight_moves():
    W, H = torch.ones(3, 4), torch.diag(torch.tensor([1.0, 100.0, 1.0, 10000.0]))
    S = pruned(W, Gram.damped(H), NM(2, 4))
    assert torch.equal(S, torch.tensor([[0.0, 1.0, 0.0, 1.0]]).expand(3, 4))
