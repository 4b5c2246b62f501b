import pytest
import torch

from sparlow.linalg.grid import Grid, GridValues, make_grid
from sparlow.linalg.rounding import FEW, Rounding, learn_magnitudes, whole_magnitudes

GRIDS = [Grid(bits, levels, 8) for bits in (8, 4, 3, 2) for levels in ("integer", "half", "book")]

every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)
masked_or_not = pytest.mark.parametrize("masked", [False, True])


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def book(grid):
    if grid.levels != "book":
        return None
    half = grid.uniform()[2 ** (grid.bits - 1) :]
    return half**1.2


@every_grid
@masked_or_not
def test_finds_the_nearest_level(grid, masked):
    rounding = Rounding(grid, masked=masked, magnitudes=book(grid))
    levels = rounding.levels()
    assert levels.shape == (2**grid.bits,)
    usable = GridValues(grid, torch.ones(1, 1), levels, masked).usable()
    z = gaussian(40, 50) * rounding.top * 0.6
    z[0, 0] = 0.0
    nearest = levels[usable][(z[..., None] - levels[usable]).abs().argmin(-1)]
    found = rounding(z)
    zero = z == 0
    torch.testing.assert_close(found[~zero], nearest[~zero])
    assert found[zero].abs().max() <= rounding.magnitudes[0]
    assert not masked or not found[zero].any()
    assert not torch.signbit(found[found == 0]).any()


@pytest.mark.parametrize("bits", [2, 3, 4])
@masked_or_not
def test_few_numbers_and_many_are_rounded_to_the_same_bits(bits, masked):
    grid = Grid(bits, "book")
    rounding = Rounding(grid, masked=masked, magnitudes=book(grid))
    thresholds = (rounding.magnitudes[1:] + rounding.magnitudes[:-1]) / 2
    z = torch.cat([gaussian(3 * FEW) * rounding.top * 0.6, thresholds, -thresholds, torch.zeros(1)])
    together = rounding(z)  # more than FEW, so thresholds are counted; a part of them is searched
    assert torch.equal(torch.cat([rounding(part) for part in z.split(FEW // 4)]), together)


@every_grid
@masked_or_not
def test_what_is_rounded_is_encoded_and_decoded_exactly(grid, masked):
    rounding = Rounding(grid, masked=masked, magnitudes=book(grid))
    scale = gaussian(30, 5).abs()
    scale[3, 2] = 0.0
    values = GridValues(grid, scale, rounding.levels(), masked)
    X = gaussian(30, 37, seed=1)
    S = rounding.to_grid(X, values.steps(37), torch.empty_like(X))
    assert torch.equal(values.decode(values.encode(S)), S)
    assert not S[3, 16:24].any()
    assert torch.equal(rounding.to_grid(X, values.steps(37), X), S)  # in place


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_book_is_never_worse_than_where_it_began(bits):
    z, start = gaussian(5000) * 2 ** (bits - 2), make_grid(f"int{bits}", "half").uniform()[2 ** (bits - 1) :]
    weight = gaussian(5000, seed=1).square()
    grid = Grid(bits, "book")
    errors = [
        ((Rounding(grid, masked=False, magnitudes=m)(z) - z).square() * weight).sum().item()
        for m in (start, learn_magnitudes(z, weight, start))
    ]
    assert errors[1] < 0.99 * errors[0]


def test_the_book_of_few_numbers_holds_them_exactly():
    z = torch.tensor([0.3, -0.3, 1.0, 2.5, -2.5, 4.0])
    m = learn_magnitudes(z, torch.ones(6), torch.tensor([0.5, 1.5, 2.5, 3.5]))
    torch.testing.assert_close(m, torch.tensor([0.3, 1.0, 2.5, 4.0]))


def test_levels_of_a_book_stay_apart_in_16_bits():
    z = torch.cat([torch.full((50,), 1.0), torch.full((50,), 1.0001), torch.zeros(50)])
    m = learn_magnitudes(z, torch.ones(150), torch.tensor([0.2, 1.0, 1.0002, 1.0003]))
    assert m[0] > 0
    assert (m.bfloat16().float().diff() > 0).all()


def test_weights_of_zero_leave_a_level_where_it_is():
    start = torch.tensor([0.5, 1.5])
    assert torch.equal(learn_magnitudes(torch.ones(4), torch.zeros(4), start), start)


@pytest.mark.parametrize(
    ("m", "units"),
    [
        ([0.5, 1.5, 2.5, 3.5], [18, 54, 91, 127]),
        ([1e-4, 2e-4, 3e-4, 4.0], [1, 2, 3, 127]),
        ([3.98, 3.99, 4.0], [125, 126, 127]),
    ],
)
def test_whole_magnitudes_are_the_nearest_that_stay_apart(m, units):
    found = whole_magnitudes(torch.tensor(m))
    assert (found * 64).tolist() == units
    assert torch.equal(found.bfloat16().float(), found)
    assert torch.equal(found.half().float(), found)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_whole_magnitudes_cost_next_to_nothing(bits):
    z, start = gaussian(50000) * 2 ** (bits - 2), make_grid(f"int{bits}", "half").uniform()[2 ** (bits - 1) :]
    grid, m = Grid(bits, "book"), learn_magnitudes(z, torch.ones(50000), start)
    whole = whole_magnitudes(m)
    factors = [1.0, *(m[-1] / whole[-1] * f for f in torch.linspace(0.99, 1.01, 21))]  # scales are fitted to a book
    errors = [
        (Rounding(grid, masked=False, magnitudes=own)(z / factor) * factor - z).norm().item()
        for own, factor in zip([m, *[whole] * 21], factors, strict=True)
    ]
    assert min(errors[1:]) <= 1.003 * errors[0]
