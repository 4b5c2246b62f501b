from itertools import pairwise

import pytest
import torch

import oracles
from sparlow.linalg.gram import Gram
from sparlow.linalg.lowrank import (
    balanced,
    best_fit,
    cholesky_qr,
    orthonormal,
    subspace_step,
    truncated_svd,
    weighted_svd,
)

RANKS = [1, 3, 8, 24]


@pytest.fixture(params=[(24, 40), (40, 24)], ids=["wide", "tall"])
def layer(request):
    W, H = oracles.problem(*request.param, seed=0)
    return W, Gram.damped(H)


def gaussian(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def product(U, V):
    return U.double() @ V.double()


@pytest.mark.parametrize("rank", RANKS)
def test_weighted_svd_is_the_best_fit_in_the_norm_of_the_gram(layer, rank):
    M, gram = layer
    U, V = weighted_svd(M, gram, rank)
    best = oracles.objective(M - oracles.weighted_low_rank(M, gram.H, rank), gram.H)
    whole = oracles.objective(M, gram.H)
    assert (U.shape, V.shape) == ((M.shape[0], rank), (rank, M.shape[1]))
    assert oracles.objective(M - product(U, V), gram.H) == pytest.approx(best, rel=1e-4, abs=1e-10 * whole)


@pytest.mark.parametrize("rank", RANKS)
def test_truncated_svd_is_the_best_fit_in_the_plain_norm(layer, rank):
    M, _ = layer
    U, V = truncated_svd(M, rank)
    best = oracles.weighted_low_rank(M, torch.eye(M.shape[1]), rank)
    assert (U.shape, V.shape) == ((M.shape[0], rank), (rank, M.shape[1]))
    torch.testing.assert_close(product(U, V), best, rtol=0, atol=1e-5)


def test_with_the_identity_both_fits_agree(layer):
    M, _ = layer
    plain, weighted = truncated_svd(M, 3), weighted_svd(M, Gram.identity(M.shape[1]), 3)
    torch.testing.assert_close(product(*plain), product(*weighted), rtol=0, atol=1e-5)


def test_rank_zero_is_an_empty_product(layer):
    M, gram = layer
    for U, V in (truncated_svd(M, 0), weighted_svd(M, gram, 0)):
        assert torch.equal(U @ V, torch.zeros_like(M))


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_subspace_steps_fall_to_the_best_fit_and_never_rise(layer, rank):
    M, gram = layer
    whole, V, errors = oracles.objective(M, gram.H), gaussian(rank, M.shape[1]), []
    for _ in range(200):
        U, V = subspace_step(M, gram.H, V)
        errors.append(oracles.objective(M - product(U, V), gram.H))
    best = oracles.objective(M - oracles.weighted_low_rank(M, gram.H, rank), gram.H)
    assert errors[0] <= whole
    assert all(later <= earlier * (1 + 1e-4) for earlier, later in pairwise(errors))
    assert errors[-1] == pytest.approx(best, rel=1e-3)


def test_a_subspace_step_leaves_the_best_fit_where_it_is(layer):
    M, gram = layer
    U, V = weighted_svd(M, gram, 3)
    torch.testing.assert_close(product(*subspace_step(M, gram.H, V)), product(U, V), rtol=0, atol=1e-4)


def few_factors(size, columns, seed=0):
    """What a subspace step has to orthonormalise if the inputs follow four common factors but for a thousandth."""
    return gaussian(size, 4, seed) @ gaussian(4, columns, seed + 1) + 1e-3 * gaussian(size, columns, seed + 2)


def distance(U):
    """How far from orthonormal."""
    return (U.T @ U - torch.eye(U.shape[1])).abs().max().item()


def twice(Y):
    """What accelerators do."""
    return cholesky_qr(cholesky_qr(Y))


NEARLY_DEPENDENT = [gaussian(500, 64) * torch.logspace(-6, 6, 64), few_factors(500, 128), few_factors(192, 100)]
DEPENDENT = [
    gaussian(64, 4) @ gaussian(4, 32, seed=1),
    gaussian(1500, 4) @ gaussian(4, 128, seed=1),
    torch.zeros(20, 4),
    torch.eye(20)[:, [0, 0, 0, 1]],
    gaussian(20, 4) * 1e-30,
    gaussian(20, 4) * 1e30,
    gaussian(20, 20),
    gaussian(20, 0),
]


@pytest.mark.parametrize("orthonormalise", [orthonormal, twice])
@pytest.mark.parametrize("Y", NEARLY_DEPENDENT)
def test_orthonormal_columns(orthonormalise, Y):
    U = orthonormalise(Y)
    assert distance(U) <= (1e-5 if orthonormalise is orthonormal else 3e-4)
    residual = Y - U @ (U.T @ Y)
    assert (residual.norm(dim=0) <= 1e-4 * Y.norm(dim=0)).all()  # the same span


def test_one_cholesky_qr_is_not_enough():
    assert distance(cholesky_qr(few_factors(500, 128))) > 0.1  # or nothing above would need two


@pytest.mark.parametrize("Y", DEPENDENT)
def test_orthonormal_whatever_comes(Y):
    U = orthonormal(Y)
    assert U.shape == Y.shape
    if U.numel():
        assert distance(U) <= 1e-5
    assert ((Y - U @ (U.T @ Y)).norm(dim=0) <= 1e-5 * Y.norm(dim=0)).all()


@pytest.mark.parametrize("Y", DEPENDENT[:6])
def test_cholesky_qr_never_gives_nan_and_nothing_too_long(Y):
    assert torch.linalg.matrix_norm(twice(Y), 2) < 1.001


def flat(rows, columns):
    """A matrix of which no direction stands out, in a metric of the same kind."""
    X = gaussian(4 * columns, columns, seed=1)
    return gaussian(rows, columns), Gram.damped(X.T @ X)


@pytest.mark.parametrize("rank", [1, 6, 20])
@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
@pytest.mark.parametrize("few", [True, False])
def test_the_best_fit_is_found_from_anywhere(rank, shape, few):
    M, gram = flat(*shape)
    if few:
        M, gram = few_factors(*shape), Gram.damped(oracles.problem(*shape, 0, factors=3, noise=1e-2)[1])
    space = gram.coordinates()
    M = M / gram.scale
    U, V = best_fit(space.to_scaled(M), space.G, gaussian(rank, shape[1]), space.root)
    best = oracles.objective(M - oracles.weighted_low_rank(M, gram.H, rank), gram.H)
    now = oracles.objective(M.double() - product(U, space.from_scaled(V)), gram.H)
    assert now <= 1.01 * best
    assert distance(U) <= 1e-5


def test_the_best_fit_takes_no_svd_where_the_start_is_near():
    M, gram = layer_with_a_gap()
    U, V = weighted_svd(M, gram, 3)
    start = V + 0.01 * gaussian(*V.shape)
    space = gram.coordinates()

    def root():
        raise AssertionError("not needed")

    U, V = best_fit(space.to_scaled(M), space.G, space.to_scaled(start), root)
    best = oracles.objective(M - oracles.weighted_low_rank(M, gram.H, 3), gram.H)
    assert oracles.objective(M - product(U, space.from_scaled(V)), gram.H) == pytest.approx(best, rel=1e-3)


def layer_with_a_gap():
    _, H = oracles.problem(24, 40, 0)
    return gaussian(24, 3) @ gaussian(3, 40, seed=1) + 0.05 * gaussian(24, 40, seed=2), Gram.damped(H)


def test_a_root_that_needed_damping_is_reported():
    H = torch.eye(6)
    H[0, 1] = H[1, 0] = 1.05  # indefinite, but within the bound
    gram = Gram.damped(H, absolute=0, relative=0)
    gram.coordinates().root()
    assert gram.extra_damping > 0


@pytest.mark.parametrize("power", [-90, -10, -1, 0, 10, 90])
def test_balanced_factors_have_the_same_product_to_the_bit(power):
    U = torch.linalg.qr(gaussian(40, 6)).Q
    V = gaussian(6, 50) * 2.0 ** torch.tensor([0.0, 1, -12, 12, -20, 3])[:, None] * 2.0**power
    balancedU, balancedV = balanced(U, V)
    assert torch.equal(balancedU[:, :, None] * balancedV, U[:, :, None] * V)
    inside = (V.abs().amax(1) >= 2**-8) & (V.abs().amax(1) <= 2**14)
    assert torch.equal(balancedU[:, inside], U[:, inside])  # what is well as it is stays orthonormal
    if abs(power) < 90:
        assert torch.isfinite(balancedV.half()).all()
        torch.testing.assert_close(balancedV.half().float(), balancedV, rtol=0, atol=2e-3 * balancedV.abs().max())
    u, v = balancedU.abs().amax(0), balancedV.abs().amax(1)
    assert (((u / v).log2().abs() <= 2) | inside).all()


def test_factors_of_nothing_stay_as_they_are():
    for part in balanced(torch.zeros(4, 3), torch.ones(3, 5)):
        assert torch.isfinite(part).all()
    assert [tuple(part.shape) for part in balanced(torch.zeros(4, 0), torch.zeros(0, 5))] == [(4, 0), (0, 5)]


def test_subspace_step_on_nothing_is_nothing():
    U, V = subspace_step(torch.zeros(6, 8), torch.eye(8), gaussian(2, 8))
    assert torch.equal(U @ V, torch.zeros(6, 8))
