import math

import pytest
import torch

import oracles
from sparlow.errors import InputError
from sparlow.linalg.gram import Gram, GramAccumulator

CPU = torch.device("cpu")


def inputs(tokens, features, seed=0):
    return torch.randn(tokens, features, generator=torch.Generator().manual_seed(seed))


def moments(X):
    return 2 / oracles.SEQUENCES * X.double().T @ X.double()


# --- damping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("absolute", "relative"), [(0.005, 0.005), (0.1, 0), (0, 0.1), (0, 0)])
def test_damping_is_the_documented_formula(absolute, relative):
    H = moments(inputs(64, 12) * torch.logspace(-1, 1, 12))
    gram = Gram.damped(H, absolute=absolute, relative=relative)
    torch.testing.assert_close(gram.H.double(), oracles.damp(H, absolute, relative), rtol=1e-6, atol=0)
    assert not gram.dead.any()


def test_the_default_damping_is_half_a_percent_of_each_kind():
    H = moments(inputs(64, 12))
    assert torch.equal(Gram.damped(H).H, Gram.damped(H, absolute=0.005, relative=0.005).H)


def test_damping_leaves_the_given_matrix_alone():
    H = moments(inputs(64, 12)).float()
    before = H.clone()
    Gram.damped(H)
    assert torch.equal(H, before)


def test_a_dead_column_gets_a_one_and_is_remembered():
    X = inputs(64, 12)
    X[:, [3, 7]] = 0
    gram = Gram.damped(moments(X))
    assert gram.dead.nonzero().flatten().tolist() == [3, 7]
    assert gram.H[gram.dead].sum(1).tolist() == [1, 1]  # nothing beside the diagonal
    torch.testing.assert_close(gram.H[0, 0].double(), oracles.damp(moments(X))[0, 0], rtol=1e-6, atol=0)
    assert torch.isfinite(gram.coordinates(conditional=True).ridge(0.1)).all()


def test_identity_is_the_identity():
    gram = Gram.identity(5)
    assert torch.equal(gram.H, torch.eye(5))
    assert not gram.dead.any()


@pytest.mark.parametrize(
    "H",
    [
        torch.eye(3)[:2],
        torch.ones(3),
        torch.ones(2, 3, 3),
        torch.eye(3) * float("nan"),
        torch.eye(3) * float("inf"),
        torch.diag(torch.tensor([1.0, -1.0])),
    ],
    ids=["not square", "a vector", "a stack", "NaN", "infinity", "a negative diagonal"],
)
def test_refuses_what_is_no_second_moment(H):
    with pytest.raises(InputError, match="H "):
        Gram.damped(H)


@pytest.mark.parametrize("name", ["absolute", "relative"])
def test_refuses_negative_damping(name):
    with pytest.raises(InputError, match="negative"):
        Gram.damped(torch.eye(3), **{name: -1e-9})


@pytest.mark.parametrize("power", [-90, -60, 60, 90])
def test_a_factor_of_the_gram_is_taken_out_where_sums_would_leave_the_range_of_float32(power):
    H = moments(inputs(64, 12) * torch.logspace(-1, 1, 12)).float()
    plain, scaled = Gram.damped(H), Gram.damped(H * 2.0**power)
    assert 1 / 4 <= scaled.H.diagonal().max() <= 16
    for name in ("correlation", "cholesky"):
        assert torch.equal(getattr(scaled, name), getattr(plain, name))
    W, residual = inputs(5, 12, 1), inputs(5, 12, 2)
    assert scaled.relative_error(W, residual) == plain.relative_error(W, residual)


def test_float64_may_be_beyond_float32():
    H = moments(inputs(64, 12))
    assert torch.equal(Gram.damped(H * 2.0**300).correlation, Gram.damped(H).correlation)


# --- factorisations --------------------------------------------------------------------------------------------------


def test_correlation_and_scale_make_up_the_gram():
    gram = Gram.damped(moments(inputs(64, 12) * torch.logspace(-3, 3, 12)))
    torch.testing.assert_close(gram.correlation.diagonal(), torch.ones(12))
    torch.testing.assert_close(gram.correlation * gram.scale * gram.scale[:, None], gram.H)


def test_cholesky_is_a_root_of_the_correlation_and_adds_nothing_if_it_need_not():
    gram = Gram.damped(moments(inputs(64, 12)))
    R, extra = gram.cholesky, gram.extra_damping
    torch.testing.assert_close(R @ R.T, gram.correlation)
    assert torch.equal(R, R.tril())
    assert extra == gram.extra_damping == 0


def test_extra_damping_of_a_singular_matrix_is_reported():
    X = inputs(64, 1).expand(64, 12)  # twelve times the same feature
    gram = Gram.damped(moments(X), absolute=0, relative=0)
    assert gram.extra_damping == 0  # nothing has been factorised yet
    R, extra = gram.cholesky, gram.extra_damping
    assert 0 < extra <= 0.1
    assert gram.extra_damping == extra
    torch.testing.assert_close(R @ R.T, gram.correlation + extra * torch.eye(12), rtol=0, atol=1e-5)


def indefinite():
    """A Gram whose correlation has an eigenvalue of −0.05: no product of activations, but within the bound."""
    H = torch.eye(6)
    H[0, 1] = H[1, 0] = 1.05
    return Gram.damped(H, absolute=0, relative=0)


def test_extra_damping_of_a_ridge_is_reported():
    gram = indefinite()
    gram.coordinates().ridge(0.003)
    assert gram.extra_damping > 0


def test_extra_damping_of_the_conditional_scale_is_reported():
    gram = indefinite()
    assert torch.isfinite(gram.conditional_scale).all()
    assert gram.extra_damping > 0


def test_the_conditional_scale_is_what_the_other_inputs_leave_unexplained():
    gram = Gram.damped(moments(inputs(256, 12) @ inputs(12, 12, seed=1) * torch.logspace(-2, 2, 12)))
    damped = gram.correlation.double() + 0.03 * torch.eye(12)
    left = []
    for j in range(12):
        others = [k for k in range(12) if k != j]
        explained = damped[j, others] @ torch.linalg.solve(damped[others][:, others], damped[others, j])
        left.append(gram.H[j, j] * (damped[j, j] - explained))  # of the variance of input j
    ratios = gram.conditional_scale.square() / torch.stack(left)
    torch.testing.assert_close(ratios, ratios[:1].expand(12), rtol=1e-4, atol=0)


# --- objective -------------------------------------------------------------------------------------------------------


def test_the_objective_is_the_error_of_the_layers_output():
    X, residual = inputs(64, 12), inputs(5, 12, seed=1)
    gram = Gram.damped(X.T @ X, absolute=0, relative=0)
    torch.testing.assert_close(gram.objective(residual), (X @ residual.T).square().sum())
    assert gram.objective(residual).item() == pytest.approx(oracles.objective(residual, gram.H), rel=1e-5)


def test_relative_error_runs_from_nothing_lost_to_everything():
    gram, W = Gram.damped(moments(inputs(64, 12))), inputs(5, 12, seed=1)
    assert gram.relative_error(W, torch.zeros_like(W)) == 0
    assert gram.relative_error(W, W) == 1
    assert gram.relative_error(W, W / 2) == pytest.approx(0.25)
    assert gram.relative_error(torch.zeros_like(W), torch.zeros_like(W)) == 0


def test_a_relative_error_is_never_negative_though_its_rounded_sum_may_be(monkeypatch):
    gram = Gram.damped(torch.eye(4), absolute=0, relative=0)
    rounded = lambda _, R: (R * R).sum() * (-1e-9 if R.abs().max() < 0.1 else 1)  # noqa: E731 - what rounding leaves
    monkeypatch.setattr(Gram, "objective", rounded)
    W = torch.ones(2, 4)
    assert gram.relative_error(W, 1e-3 * W) == 0
    assert math.isnan(gram.relative_error(W, W * math.nan))  # and what is no number is not hidden


# --- accumulator -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_adds_up_in_float64_whatever_the_activations_are(dtype):
    batches = [(inputs(300, 12, seed) + 3).to(dtype) for seed in range(8)]  # sums far beyond 8 or 11 bits
    stats = GramAccumulator(12, CPU)
    for x in batches:
        stats.add(x)
    X = torch.cat(batches).double()
    assert stats.sum.dtype == torch.float64
    assert stats.tokens == 2400
    torch.testing.assert_close(stats.second_moment(16).double(), 2 / 16 * X.T @ X, rtol=1e-5, atol=0)


def test_takes_products_of_float64_in_float64():
    X = (inputs(300, 12) + 1000).double()
    stats = GramAccumulator(12, CPU)
    stats.add(X)
    torch.testing.assert_close(stats.sum.triu(), (X.T @ X).triu(), rtol=1e-13, atol=0)  # the rest is its mirror image
    assert stats.second_moment(1).dtype == torch.float32


@pytest.mark.parametrize(
    ("order", "first"), [((5, 4, 3, 2, 1, 0), 0), ((0, 2, 4, 1, 3, 5), 3), ((3, 0, 5, 1, 2, 4), 5)]
)
def test_neither_order_nor_division_changes_a_bit(order, first):
    batches = [inputs(40, 12, seed) * 10**seed for seed in range(6)]
    straight, parts = GramAccumulator(12, CPU), [GramAccumulator(12, CPU), GramAccumulator(12, CPU)]
    for x in batches:
        straight.add(x)
    for place, i in enumerate(order):
        parts[place < first].add(batches[i])
    parts[0].sum += parts[1].sum
    assert torch.equal(parts[0].second_moment(6), straight.second_moment(6))


def test_windows_may_come_in_any_shape():
    X = inputs(24, 12)
    whole, batched = GramAccumulator(12, CPU), GramAccumulator(12, CPU)
    whole.add(X)
    batched.add(X.reshape(2, 3, 4, 12))
    assert batched.tokens == 24
    torch.testing.assert_close(batched.sum, whole.sum)


def test_reading_the_moment_does_not_end_the_accumulation():
    stats = GramAccumulator(12, CPU)
    stats.add(inputs(24, 12))
    first = stats.second_moment(1)
    before = first.clone()
    stats.add(inputs(24, 12))
    assert torch.equal(first, before)
    torch.testing.assert_close(stats.second_moment(1), 2 * before)
