from itertools import pairwise

import pytest
import torch

import oracles
from sparlow.linalg.conjugate_gradient import fit_on_support
from sparlow.linalg.gram import Gram


@pytest.fixture(params=[0.5, 0.25, 1.0], ids=["half", "quarter", "whole"])
def fit(request):
    """Target T (out, in), metric G of unit diagonal (in, in), support (out, in)."""
    W, H = oracles.problem(12, 40, seed=0)
    gram = Gram.damped(H)
    mask = torch.rand(W.shape, generator=torch.Generator().manual_seed(0)) < request.param
    mask[3] = False  # one row keeps nothing
    mask[4] = True  # and one row everything
    return W * gram.scale, gram.correlation, mask


def error(T, S, G):
    return oracles.objective(T.double() - S.double(), G)


def test_ends_at_the_least_squares_solution(fit):
    T, G, mask = fit
    S = fit_on_support(T, G, torch.zeros_like(T), mask, 200)
    expected = oracles.least_squares(T, G, mask)
    torch.testing.assert_close(S.double(), expected, rtol=0, atol=1e-3 * expected.abs().max().item())
    assert error(T, S, G) == pytest.approx(error(T, expected, G), rel=1e-4)


def test_the_start_does_not_matter_in_the_end(fit):
    T, G, mask = fit
    near, far = (fit_on_support(T, G, start * mask, mask, 200) for start in (T, -T))
    torch.testing.assert_close(near, far, rtol=0, atol=2e-3 * T.abs().max().item())


def test_every_step_lowers_the_error(fit):
    T, G, mask = fit
    errors = [error(T, fit_on_support(T, G, torch.zeros_like(T), mask, steps), G) for steps in range(12)]
    assert all(later < earlier for earlier, later in pairwise(errors))


@pytest.mark.parametrize("steps", [0, 1, 7, 300])
def test_nothing_appears_outside_the_support(fit, steps):
    T, G, mask = fit
    S = fit_on_support(T, G, torch.zeros_like(T), mask, steps)
    assert (S[~mask] == 0).all()
    assert torch.isfinite(S).all()  # also long after convergence


def test_inputs_are_left_alone(fit):
    T, G, mask = fit
    S = T * mask
    before = [t.clone() for t in (T, G, S, mask)]
    fit_on_support(T, G, S, mask, 5)
    assert all(torch.equal(now, then) for now, then in zip((T, G, S, mask), before, strict=True))


def test_a_row_that_is_already_solved_stays(fit):
    T, G, mask = fit
    T = T * mask  # what the support can represent exactly
    assert torch.equal(fit_on_support(T, G, T, mask, 5), T)


def test_rows_are_independent(fit):
    T, G, mask = fit
    together = fit_on_support(T, G, T * mask, mask, 10)
    alone = fit_on_support(T[5:6], G, (T * mask)[5:6], mask[5:6], 10)
    torch.testing.assert_close(together[5:6], alone, rtol=1e-3, atol=1e-3 * T.abs().max().item())


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_a_singular_metric_is_no_reason_to_explode(tokens):
    W, H = oracles.problem(12, 40, seed=0, tokens=tokens)
    gram = Gram.damped(H, absolute=0, relative=0)
    T, mask = W * gram.scale, torch.rand(W.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    S = fit_on_support(T, gram.correlation, T * mask, mask, 20)
    assert torch.isfinite(S).all()
    assert error(T, S, gram.correlation) <= error(T, T * mask, gram.correlation)
