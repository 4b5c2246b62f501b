import pytest
import torch

import oracles
from sparlow.errors import RunError
from sparlow.linalg.coordinates import cholesky, interleave
from sparlow.linalg.gram import Gram

CONDITIONAL = pytest.mark.parametrize("conditional", [False, True], ids=["by the norm", "by what is unexplained"])
GROUP = pytest.mark.parametrize("group", [None, 4, 40])


def layer():
    W, H = oracles.problem(24, 40, 0)
    return W, Gram.damped(H)


# --- the order of columns --------------------------------------------------------------------------------------------


def test_members_of_a_place_lie_together_once_they_are_dealt():
    X = torch.arange(8.0).expand(3, 8)
    assert interleave(X, 4)[0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert interleave(X, 1) is X
    assert interleave(X, 8) is X


@GROUP
@CONDITIONAL
def test_leaving_undoes_entering(conditional, group):
    W, gram = layer()
    space = gram.coordinates(conditional=conditional, group=group)
    torch.testing.assert_close(space.from_scaled(space.to_scaled(W)), W)
    assert torch.equal(space.deinterleave(space.interleave(W)), W)
    assert space.from_scaled(W[:0]).shape == (0, 40)


@GROUP
@CONDITIONAL
def test_the_objective_is_the_same_in_all_coordinates(conditional, group):
    W, gram = layer()
    space = gram.coordinates(conditional=conditional, group=group)
    T = space.to_scaled(W).double()
    assert oracles.objective(T, space.G) == pytest.approx(oracles.objective(W, gram.H), rel=1e-4)
    assert space.G.diagonal().mean().item() == pytest.approx(1, rel=1e-4)


def test_coordinates_are_made_once_and_the_last_are_kept():
    _, gram = layer()
    made = [gram.coordinates(conditional=c, group=g) for c in (False, True) for g in (None, 2, 4)]
    assert len({id(space) for space in made}) == 6
    assert gram.coordinates(conditional=True, group=4) is made[-1]
    made[-1].ridge(0.1)
    assert gram.remembered == 40 * 40 * 4
    assert gram.coordinates().G is gram.correlation  # not another matrix (in, in)
    assert gram.remembered == 0


# --- ridge inverses --------------------------------------------------------------------------------------------------


@GROUP
@CONDITIONAL
def test_ridge_equals_the_dense_formula(conditional, group):
    _, gram = layer()
    space = gram.coordinates(conditional=conditional, group=group)
    G = space.G.double()
    for rho in (0.003, 0.1, 5.0):
        expected = rho * torch.linalg.inv(G + rho * torch.eye(40))
        torch.testing.assert_close(space.ridge(rho).double(), expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(space.G, G.float(), rtol=0, atol=0)


def test_a_ridge_inverse_is_computed_once():
    _, gram = layer()
    space = gram.coordinates()
    M = space.ridge(0.1)
    assert space.ridge(0.1) is M
    assert space.ridge(0.2) is not M


def test_no_more_ridge_inverses_are_kept_than_there_is_room_for():
    _, gram = layer()
    plain = gram.coordinates()
    gram = Gram(gram.H, gram.dead, remember=2 * 40 * 40 * 4)
    space = gram.coordinates()
    for rho in (0.1, 0.2, 0.4, 0.1, 0.4):
        torch.testing.assert_close(space.ridge(rho), plain.ridge(rho))
    assert list(space._ridges) == [0.1, 0.2]  # the first, for a repeated solve starts with those again
    assert gram.remembered == 2 * 40 * 40 * 4


# --- factorisations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lowest", [-3e-6, -3e-4, -0.03])
def test_cholesky_adds_just_the_power_of_ten_that_is_needed(lowest):
    A = torch.diag(torch.tensor([lowest, 1.0, 2 - lowest]))  # of unit scale: the mean of the diagonal is 1
    factor, extra = cholesky(A, "A")
    assert -lowest < extra < -10 * lowest
    torch.testing.assert_close(factor @ factor.T, A + extra * torch.eye(3))


def test_a_matrix_beyond_rescue_is_named():
    A = torch.diag(torch.tensor([-0.2, 1.2]))
    with pytest.raises(RunError, match="the inputs of layer 7"):
        cholesky(A, "the inputs of layer 7")
