import pytest
import torch

from sparlow.linalg.error_curves import error_curve
from sparlow.linalg.gram import Gram
from sparlow.linalg.lowrank import weighted_svd
from sparlow.linalg.patterns import NM, Unstructured


def problem(rows, columns, tokens=400):
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(columns, columns, generator=generator) * torch.logspace(0, -2, columns)
    X = torch.randn(tokens, columns, generator=generator) @ mixing
    return torch.randn(rows, columns, generator=generator), Gram.damped(X.T @ X)


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.7)])
@pytest.mark.parametrize("shape", [(48, 64), (96, 32)])
def test_the_curve_is_that_of_the_best_low_rank_parts(pattern, shape):
    W, gram = problem(*shape)
    ranks = [0, 1, 5, 12]
    rest = W * ~pattern.mask(W.abs() * gram.scale)
    exact = []
    for rank in ranks:
        U, V = weighted_svd(rest, gram, rank)
        exact.append(gram.relative_error(W, rest - U @ V))
    assert error_curve(W, gram, pattern, ranks) == pytest.approx(exact, rel=5e-3)


def test_full_rank_leaves_nothing_and_a_zero_weight_has_no_error():
    W, gram = problem(16, 24)
    assert error_curve(W, gram, NM(2, 4), [16])[0] == pytest.approx(0, abs=1e-5)
    assert error_curve(torch.zeros(16, 24), gram, NM(2, 4), [0, 3]) == [0.0, 0.0]


@pytest.mark.parametrize("factor", [2.0**-90, 2.0**90])
def test_no_factor_of_the_weight_changes_the_curve(factor):
    W, gram = problem(16, 24)
    assert error_curve(W * factor, gram, NM(2, 4), [0, 3]) == error_curve(W, gram, NM(2, 4), [0, 3])
