from itertools import pairwise

import pytest
import torch

import oracles
from sparlow.linalg.gram import Gram
from sparlow.linalg.lowrank import orthonormal, subspace_step, truncated_svd, weighted_svd

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


@pytest.mark.parametrize("columns", [1, 8, 64])
def test_orthonormal_columns(columns):
    Y = gaussian(500, columns) * torch.logspace(-6, 6, columns)  # the length of a column does not matter
    U = orthonormal(Y)
    torch.testing.assert_close(U.T @ U, torch.eye(columns), rtol=0, atol=1e-4)
    residual = Y - U @ (U.T @ Y)
    assert (residual.norm(dim=0) <= 1e-4 * Y.norm(dim=0)).all()  # the same span


@pytest.mark.parametrize("size", [64, 1500])
def test_orthonormal_survives_dependent_columns(size):
    Y = gaussian(size, 4) @ gaussian(4, 32, seed=1)
    U = orthonormal(Y)
    assert torch.isfinite(U).all()
    assert torch.linalg.matrix_norm(U, 2) < 1.001  # directions that are not there come out short, never long
    assert (Y - U @ (U.T @ Y)).norm() < 1e-3 * Y.norm()


@pytest.mark.parametrize("Y", [torch.zeros(20, 4), torch.eye(20)[:, [0, 0, 0, 1]], gaussian(20, 4) * 1e-30])
def test_orthonormal_never_gives_nan(Y):
    assert torch.isfinite(orthonormal(Y)).all()


def test_subspace_step_on_nothing_is_nothing():
    U, V = subspace_step(torch.zeros(6, 8), torch.eye(8), gaussian(2, 8))
    assert torch.equal(U @ V, torch.zeros(6, 8))
