"""The pieces that put a weight on a grid: scales, sweep, descent, factors, and all of them in turns."""

import pytest
import torch

import oracles
from sparlow.linalg.descent import descend
from sparlow.linalg.factors import fitted_left, stored_factors
from sparlow.linalg.gram import Gram
from sparlow.linalg.grid import Grid
from sparlow.linalg.grid_fit import finished, fitted_to_grid, metric, rounded, stored
from sparlow.linalg.grid_target import GridTarget, Storage
from sparlow.linalg.lowrank import truncated_svd
from sparlow.linalg.patterns import NM
from sparlow.linalg.scales import least_squares, searched, unclipped
from sparlow.linalg.sweep import block_bounds, saliency, swept_to_grid

OUT, IN, GROUP = 24, 60, 16  # the last group is shorter
MASK = NM(2, 4)

masked_or_not = pytest.mark.parametrize("masked", [False, True])


def layer(seed=0):
    W, H = oracles.problem(OUT, IN, seed)
    return W, Gram.damped(H)


def target(masked=False, levels="half", bits=3, group=GROUP, dtype=torch.float16, **changes):
    return GridTarget(Grid(bits, levels, group), masked, Storage(dtype, **changes))


def on_grid(W, to):
    """W, zero where 2:4 prunes it if the target is masked; its rounding, on the grid; scale, rounding, levels."""
    kept = W * MASK.mask(W.abs()) if to.masked else W
    S, values = rounded(kept, to)
    return kept, S, values.scale, to.rounding()


def error(R, H):
    return oracles.objective(R, H)


# --- scales ----------------------------------------------------------------------------------------------------------


@masked_or_not
def test_searched_scales_are_the_best_of_the_clippings(masked):
    W, gram = layer()
    to, weight = target(masked), gram.H.diagonal()
    kept, _, _, rounding = on_grid(W, to)
    found = searched(kept, weight, to, rounding)
    whole = unclipped(kept, to, rounding)

    def lost(scale):
        S = rounding.to_grid(kept, to.steps(scale, IN), torch.empty_like(kept))
        return torch.stack([part.sum(1) for part in ((S - kept).square() * weight).split(GROUP, 1)], 1)

    errors = torch.stack([lost((whole * share).half().float()) for share in torch.linspace(0.3, 1, 10)])
    torch.testing.assert_close(lost(found), errors.amin(0), rtol=1e-4, atol=1e-7)
    assert torch.equal(found, found.half().float())  # as stored
    assert lost(found).sum() < 0.9 * lost(whole.half().float()).sum()


def test_a_group_of_zeros_has_no_scale():
    W, gram = layer()
    W[2, :GROUP] = 0
    to = target()
    found = searched(W, gram.H.diagonal(), to, to.rounding())
    assert found[2, 0] == 0
    assert (found > 0).sum() == found.numel() - 1


@masked_or_not
@pytest.mark.parametrize("group", [GROUP, None])
def test_least_squares_scales_are_optimal(masked, group):
    W, gram = layer()
    W, H = W.double(), gram.H.double()
    to = target(masked, group=group)
    kept, S, scale, rounding = on_grid(W, to)
    C = rounding(kept / to.steps(scale, IN)) if not masked else S / to.steps(scale, IN)
    exact = GridTarget(to.grid, masked, Storage(torch.float32))  # scales are rounded to bfloat16, which is coarse
    found = least_squares(C, W, H, scale.double(), exact).double()
    for row in (0, 5):
        columns = torch.stack([C[row] * (to.steps(torch.eye(scale.shape[1]), IN)[g]) for g in range(scale.shape[1])], 1)
        best = torch.linalg.solve(columns.T @ H @ columns, columns.T @ H @ W[row])
        torch.testing.assert_close(found[row], best, rtol=2**-7, atol=1e-6)
    assert error(W - C * to.steps(found, IN), H) < error(W - C * to.steps(scale, IN), H)


# --- sweep and descent -----------------------------------------------------------------------------------------------


def test_blocks_begin_where_groups_do():
    assert block_bounds(300, 128) == [0, 128, 256, 300]
    assert block_bounds(300, 128, 96) == [0, 96, 128, 192, 256, 288, 300]
    assert block_bounds(300, 120, 90, 60) == [0, 120, 180, 240, 300]
    assert block_bounds(300, 128, None) == [0, 128, 256, 300]


@masked_or_not
def test_a_sweep_makes_up_for_rounding(masked):
    W, gram = layer()
    to = target(masked)
    kept, S, _, rounding = on_grid(W, to)
    mask = kept != 0 if masked else None
    swept, values = swept_to_grid(W, gram, mask, to, rounding)
    assert torch.equal(values.decode(values.encode(swept)) * (swept != 0), swept)
    assert torch.equal(swept != 0, S != 0)
    assert error(W - swept, gram.H) < 0.8 * error(W - S, gram.H)


def test_a_dead_input_has_no_saliency():
    _, H = oracles.problem(OUT, IN, 0)
    H[3] = H[:, 3] = 0
    assert saliency(Gram.damped(H))[3] == 0


@masked_or_not
@pytest.mark.parametrize("levels", ["integer", "half", "book"])
def test_descent_never_rises_and_ends_where_no_single_change_pays(masked, levels):
    W, gram = layer()
    W, H = W.double(), gram.H.double()
    to = target(masked, levels)
    _, S, scale, rounding = on_grid(W, to)
    scale, before, support = scale.double(), error(W - S, H), S != 0
    for _ in range(200):
        S, left = descend(S, W, H, scale, to, rounding)
        now = error(W - S, H)
        assert left.sum().item() == pytest.approx(now, rel=1e-6)
        assert now <= before * (1 + 1e-9)
        if now == before:
            break
        before = now
    assert not masked or torch.equal(S != 0, support)
    levels = to.values(scale, rounding)
    usable = levels.levels.double()[levels.usable()]
    R, step = W - S, to.steps(scale, IN)
    for level in usable:
        change = (level * step - S) * (support if masked else 1)
        gain = 2 * change * (R @ H) - change.square() * H.diagonal()
        assert gain.max() <= 1e-9 * before


# --- factors ---------------------------------------------------------------------------------------------------------


def test_the_left_factor_is_the_best_for_the_right_one():
    W, gram = layer()
    W, H = W.double(), gram.H.double()
    V = truncated_svd(W, 4)[1]
    V[2] = 0
    U = fitted_left(W, H, V)
    assert not U[:, 2].any()
    rest = torch.tensor([0, 1, 3])
    best = torch.linalg.solve(V[rest] @ H @ V[rest].T, V[rest] @ H @ W.T).T
    torch.testing.assert_close(U[:, rest], best, rtol=1e-4, atol=1e-8)  # a jitter keeps the factorisation from failing


@pytest.mark.parametrize("unit", [2.0**-6, 1.0, 2.0**40])
def test_int8_factors_lose_little(unit):
    W, gram = layer()
    U, V = truncated_svd(W, 4)
    storage = Storage(torch.bfloat16, unit)
    u, v, scales = stored_factors(W, gram.H, U, V, storage, int8=True)
    for codes in (u / scales.U, v / scales.V[:, None]):
        torch.testing.assert_close(codes, codes.round(), rtol=1e-5, atol=0)
        assert codes.abs().max().round() == 127
    ratio = (scales.U / (scales.V * unit)).log2().abs().max()
    assert ratio < 3  # both fit 16 bits, whatever the unit
    assert error(W - u @ v, gram.H) < 1.01 * error(W - fitted_left(W, gram.H, V) @ V, gram.H)


# --- all of it -------------------------------------------------------------------------------------------------------


@masked_or_not
@pytest.mark.parametrize("int8", [False, True])
def test_the_finish_never_raises_the_error_and_measures_what_it_returns(masked, int8):
    W, gram = layer()
    to = GridTarget(Grid(3, "half", GROUP), masked, Storage(torch.bfloat16), int8)
    kept, *_ = on_grid(W, to)
    U, V = truncated_svd(W, 4)
    start = stored(W, gram, rounded((W - U @ V) * (kept != 0), to), U, V, to)
    end = finished(W, gram, start, to)
    assert end.error < 0.8 * start.error
    assert end.error == pytest.approx(error(W - end.S - end.U @ end.V, gram.H), rel=1e-3)
    assert torch.equal(end.U.bfloat16().float(), end.U) or int8
    assert (end.factors is not None) == int8


def test_any_result_is_put_on_a_grid_no_worse_than_by_rounding():
    W, gram = layer()
    S = W * MASK.mask(W.abs())
    to = GridTarget(Grid(4, "half", GROUP), masked=True)
    U, V = W.new_zeros(OUT, 0), W.new_zeros(0, IN)
    assert fitted_to_grid(W, gram, S, U, V, to).error < stored(W, gram, rounded(S, to), U, V, to).error


def test_a_dead_input_weighs_next_to_nothing():
    _, H = oracles.problem(OUT, IN, 0)
    H[3] = H[:, 3] = 0
    gram = Gram.damped(H * 1e-6)
    assert gram.H[3, 3] == 1
    assert 0 < metric(gram)[3, 3] < 1e-5 * metric(gram).diagonal().mean()
    assert metric(layer()[1]) is not None
