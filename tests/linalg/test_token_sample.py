import pytest
import torch

from sparlow.algorithms import find, solve
from sparlow.linalg.gram import EvenGramAccumulator, Gram, GramAccumulator
from sparlow.linalg.patterns import NM
from sparlow.linalg.token_sample import KEPT, TokenSample, error_per_token

CPU = torch.device("cpu")


def massive(tokens=4000, features=32, huge=4):
    """Ordinary tokens and a few, alike, that hold more than 99 % of the energy."""
    X = torch.randn(tokens, features, generator=torch.Generator().manual_seed(0))
    X[:: tokens // huge] = 1000 * torch.randn(features, generator=torch.Generator().manual_seed(1))
    return X


@pytest.mark.parametrize("tokens", [1, 100, 511, 512, 5000, 100_000])
def test_a_bounded_number_of_tokens_is_kept_whatever_the_portions(tokens):
    X = torch.randn(tokens, 4, generator=torch.Generator().manual_seed(0))
    whole, portions = TokenSample(4, CPU), TokenSample(4, CPU)
    whole.add(X)
    for part in X.split(777):
        portions.add(part)
    assert torch.equal(whole.rows, portions.rows)
    assert min(tokens, KEPT // 2) <= len(whole.rows) <= 2 * KEPT
    torch.testing.assert_close(whole.rows.norm(dim=1), torch.ones(len(whole.rows)))


@pytest.mark.parametrize("seqlen", [128, 2048, 2047])
def test_all_positions_of_a_window_have_their_turn(seqlen):
    sample = TokenSample(2, CPU)
    positions = torch.arange(1.0, seqlen + 1)
    for _ in range(64):
        sample.add(torch.stack((positions, torch.full_like(positions, 1e4)), 1))
    kept = sample.rows[:, 0] / sample.rows[:, 1] * 1e4
    assert len(kept.round().unique()) > min(seqlen, len(kept)) / 2
    assert kept.mean() == pytest.approx(seqlen / 2, rel=0.1)


def test_a_token_of_zeros_is_no_nan():
    sample, even = TokenSample(4, CPU), EvenGramAccumulator(4, CPU)
    sample.add(torch.zeros(3, 4))
    even.add(torch.zeros(3, 4))
    assert not sample.rows.any()
    assert not even.sum.any()
    assert error_per_token(sample.rows, torch.ones(2, 4), torch.ones(2, 4)) == 0


def test_a_few_massive_tokens_hide_the_error_of_the_others_and_the_second_figure_does_not():
    X = massive()
    W = torch.randn(16, 32, generator=torch.Generator().manual_seed(2))
    seen = GramAccumulator(32, CPU)
    seen.add(X)
    gram = Gram.damped(seen.second_moment(1), absolute=0, relative=1e-6, sample=seen.sample.rows)
    found = solve(find("3basil")[0], W, gram, NM(2, 4), 2, {})
    ordinary = X[X.norm(dim=1) < 100]
    R = W - found.dense()
    true = ((ordinary @ R.T).square().sum() / (ordinary @ W.T).square().sum()).item()
    assert found.stats["relative_error"] < 0.01 < true
    assert found.stats["relative_error_per_token"] == pytest.approx(true, rel=0.1)


def test_the_even_sums_are_those_of_tokens_of_length_one():
    X = massive().double()
    even = EvenGramAccumulator(32, CPU)
    for part in X.view(4, -1, 32):
        even.add(part)
    unit = X / X.norm(dim=1, keepdim=True)
    torch.testing.assert_close(even.second_moment(2).double(), unit.T @ unit, rtol=1e-5, atol=1e-4)


def test_a_gram_without_a_sample_has_no_second_figure():
    W = torch.randn(8, 16)
    assert Gram.identity(16).relative_error_per_token(W, W) is None
    assert "relative_error_per_token" not in solve(find("magnitude")[0], W, Gram.identity(16), NM(2, 4), 0, {}).stats
