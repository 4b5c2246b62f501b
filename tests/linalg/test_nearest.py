import pytest
import torch

from sparlow.linalg.error_curves import error_curve
from sparlow.linalg.gram import Gram
from sparlow.linalg.grid import make_grid
from sparlow.linalg.nearest import nearest
from sparlow.linalg.patterns import NM, Unstructured


def drawn(rows, columns):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns))


def test_plain_rounding_is_off_by_half_a_step_at_most():
    W = drawn(5, 300)
    S = nearest(W, make_grid("int4", "integer"))
    for start in range(0, 300, 128):
        part, found = W[:, start : start + 128], S[:, start : start + 128]
        step = (part.abs().amax(1, keepdim=True) / 7).to(torch.bfloat16).float()
        assert ((part - found).abs() <= step * 0.53).all()  # half a step, and what 16 bits of a scale lose at its end
        assert len((found[0] / step[0]).round().unique()) <= 15


@pytest.mark.parametrize("pattern", [Unstructured(0.0), NM(2, 4)])
def test_an_error_curve_counts_what_rounding_costs(pattern):
    W, X = drawn(24, 64), drawn(200, 64)
    gram = Gram.damped(X.T @ X)
    plain, *rounded = (
        error_curve(W, gram, pattern, [0, 2, 8], grid) for grid in (None, *map(make_grid, ("int8", "int4", "int3")))
    )
    for fewer, more in zip([plain, *rounded[:-1]], rounded, strict=True):
        assert all(a <= b * (1 + 1e-3) + 1e-6 for a, b in zip(fewer, more, strict=True))
    assert rounded[-1][0] > rounded[-1][1] > rounded[-1][2] > 0
    if pattern.density == 1:
        assert plain == pytest.approx([0, 0, 0], abs=1e-6)
        residual = W - nearest(W, make_grid("int3"))
        assert rounded[-1][0] == pytest.approx(gram.relative_error(W, residual), rel=0.02)
