"""What 3BASiL promises beyond the contract: where it ends, and that its steps are those of the paper or better."""

import math
from contextlib import contextmanager
from functools import cache

import pytest
import torch

import layers
import oracles
from sparlow.algorithms import _loop, find, solve, three_basil
from sparlow.algorithms._loop import Loop
from sparlow.algorithms.three_basil import _paper
from sparlow.errors import InputError
from sparlow.linalg import patterns
from sparlow.linalg.gram import Gram
from sparlow.linalg.patterns import NM, parse_pattern

PATTERNS = ("2:4", "2:8", "0.5", "0.7")
PROBLEMS = {"wide": (96, 160, 3), "tall": (160, 96, 4)}  # out, in, seed
RANK = 8

# Relative objective at default effort; the tests allow 3 % more. Each is the highest of five solves whose weights
# differ by one part in a million, because the rounding of another machine differs as much. Printed, after a change
# that is meant to move them (last when inputs were scaled by what the others leave unexplained, which ends lower), by
#     PYTHONPATH=src:tests:tests/algorithms python -c "import test_three_basil as t; t.print_goldens()"
GOLDENS = {
    "wide": {"2:4": 0.0005344, "2:8": 0.002672, "0.5": 0.0002254, "0.7": 0.001209},
    "tall": {"2:4": 0.0001804, "2:8": 0.0008706, "0.5": 7.985e-05, "0.7": 0.0003939},
}

every_pattern = pytest.mark.parametrize("pattern", PATTERNS)
every_problem = pytest.mark.parametrize("name", PROBLEMS)


def run(W, gram, pattern, rank=RANK, **options):
    return solve(find("3basil")[0], W, gram, parse_pattern(pattern), rank, options)


def error(W, gram, pattern, rank=RANK, **options):
    return run(W, gram, pattern, rank, **options).stats["relative_error"]


def layer(out, inp, seed, **changes):
    W, H = oracles.problem(out, inp, seed, **changes)
    return W, Gram.damped(H)


@cache
def reached(name, pattern):
    """Relative objective at default effort."""
    return error(*layer(*PROBLEMS[name]), pattern)


def geometric_mean(values):
    return math.prod(values) ** (1 / len(values))


def print_goldens():
    for name, size in PROBLEMS.items():
        W, gram = layer(*size)
        for pattern in PATTERNS:
            noise = [1e-6 * torch.randn(W.shape, generator=torch.Generator().manual_seed(seed)) for seed in range(5)]
            worst = max(error(W * (1 + n), gram, pattern) for n in noise)
            print(f'"{name}" "{pattern}": {worst:.4g}')  # noqa: T201 - this is what it is for


# --- where it ends ---------------------------------------------------------------------------------------------------


@every_pattern
@every_problem
def test_ends_no_higher_than_it_used_to(name, pattern):
    assert reached(name, pattern) <= 1.03 * GOLDENS[name][pattern]


@every_pattern
@every_problem
def test_the_joint_schedule_ends_far_below_the_papers(name, pattern):
    assert reached(name, pattern) < 0.8 * error(*layer(*PROBLEMS[name]), pattern, schedule="paper")


def test_coordinates_of_what_is_unexplained_pay(monkeypatch):
    cases = [(name, pattern) for name in PROBLEMS for pattern in PATTERNS]
    now = [reached(name, pattern) for name, pattern in cases]
    monkeypatch.setattr(Gram, "conditional_scale", Gram.scale)
    plain = [error(*layer(*PROBLEMS[name]), pattern) for name, pattern in cases]
    assert geometric_mean(now) < 0.99 * geometric_mean(plain)


@every_pattern
def test_the_papers_schedule_ends_where_the_papers_method_does(pattern):
    choose, ratios = parse_pattern(pattern).mask, []
    for size in ((32, 48, 2), (40, 32, 3)):
        W, gram = layer(*size)
        D, L, _, _ = oracles.paper_admm(W, gram.H, choose, 4)
        plain = oracles.objective(W - D - L, gram.H) / oracles.objective(W, gram.H)
        ratios.append(error(W, gram, pattern, 4, schedule="paper") / plain)
    assert geometric_mean(ratios) < 1.05
    assert max(ratios) < 1.15  # of so small a problem, a single solve may end in a worse support


def test_effort_pays():
    W, gram = layer(64, 96, 6)
    quick, thorough = ([run(W, gram, pattern, effort=effort).stats for pattern in PATTERNS] for effort in (0.5, 2.0))
    ratios = [t["relative_error"] / q["relative_error"] for t, q in zip(thorough, quick, strict=True)]
    assert math.prod(ratios) < 1
    assert max(ratios) < 1.03
    assert all(t["iterations"] > q["iterations"] for t, q in zip(thorough, quick, strict=True))


@pytest.mark.parametrize("pattern", ["2:4", "2:8", "0.7"])
def test_finds_again_what_a_weight_was_made_of(pattern):
    W, gram = layer(64, 96, 7)
    S = W * parse_pattern(pattern).mask(W.abs())
    generator = torch.Generator().manual_seed(0)
    L = 0.1 * torch.randn(64, 4, generator=generator) @ torch.randn(4, 96, generator=generator)
    found = run(S + 0.1 * L, gram, pattern, 4)
    assert found.stats["relative_error"] < 1e-5
    assert ((found.S != 0) == (S != 0)).float().mean() > 0.99


@pytest.mark.parametrize("schedule", ["joint", "paper"])
@pytest.mark.parametrize("absolute", [0.005, 0.0], ids=["damped", "not damped by the mean"])
@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
def test_survives_massive_activations(pattern, absolute, schedule):
    W, H = oracles.problem(64, 96, 7, massive=3)
    assert H.diagonal().max() > 1e8 * H.diagonal().median()
    gram = Gram.damped(H, absolute=absolute)
    found = run(W, gram, pattern, schedule=schedule)
    wanda = solve(find("wanda")[0], W, gram, parse_pattern(pattern), 0, {})
    assert found.stats["relative_error"] < 0.5 * wanda.stats["relative_error"]
    residual = W.double() - found.S.double() - found.U.double() @ found.V.double()
    exact = oracles.objective(residual, gram.H) / oracles.objective(W, gram.H)
    assert found.stats["relative_error"] == pytest.approx(exact, rel=1e-2)


@pytest.mark.parametrize("pattern", ["0.5", "0.7"])
def test_a_sampled_threshold_costs_little(pattern, monkeypatch):
    cases = [layer(128, 120, 5), layer(120, 160, 6)]  # every 15th and 18th entry would see few columns
    exact = [error(*case, pattern) for case in cases]
    monkeypatch.setattr(patterns._SampleProjector, "SAMPLE", 1024)
    sampled = [error(*case, pattern) for case in cases]
    assert sampled != exact
    assert geometric_mean([one / other for one, other in zip(sampled, exact, strict=True)]) < 1.1


# --- its steps -------------------------------------------------------------------------------------------------------


def in_float64(W, gram, **where):
    """The target and the coordinates of a loop whose rounding does not blur a comparison."""
    space = Gram(gram.H.double(), gram.dead).coordinates(group=4, **where)
    return space.to_scaled(W.double()), space


@pytest.mark.parametrize("steps", [10, 40, 90])
def test_without_low_rank_part_the_iterates_are_the_papers(steps):
    W, gram = layer(24, 40, 0)
    pattern = NM(2, 4)
    T, space = in_float64(W, gram)
    loop = Loop(T, space, pattern, 0, rho=0.1)
    _paper(loop, 0.5, steps)
    D, _, _, rho = oracles.paper_admm(W, gram.H, pattern.mask, 0, max_steps=steps)
    D = space.to_scaled(D)
    torch.testing.assert_close(loop.D, D, rtol=0, atol=1e-8 * D.abs().max().item())
    assert loop.rho == pytest.approx(rho)


@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
@pytest.mark.parametrize("steps", [10, 70])
def test_the_literal_schedule_is_the_papers_algorithm_step_by_step(pattern, steps):
    W, gram = layer(24, 40, 0)
    choose = parse_pattern(pattern).mask
    D, L, _, rho = oracles.paper_admm(W, gram.H, choose, 4, max_steps=steps)
    wide, exact = layers.in_float64(W, gram)
    found = three_basil.three_basil(wide, exact, parse_pattern(pattern), 4, schedule="literal", max_steps=steps)
    torch.testing.assert_close(found.S, D, rtol=0, atol=1e-8 * D.abs().max().item())
    torch.testing.assert_close(found.U @ found.V, L, rtol=0, atol=1e-8 * L.abs().max().item())
    assert found.stats["rho"] == pytest.approx(rho)


@pytest.mark.parametrize("rho", [0.01, 0.3])
def test_the_joint_step_is_the_minimum_over_both_blocks(rho):
    W, gram = layer(24, 40, 0)
    T, space = in_float64(W, gram, conditional=True)
    G, Z = space.G, space.interleave(space.deinterleave(T) * NM(2, 4).mask(space.deinterleave(T).abs()))
    eye = torch.eye(len(G), dtype=torch.float64)

    def augmented(S, L):
        return oracles.objective(T - S - L, G) + rho * oracles.objective(S - Z, eye)

    loop = Loop(T, space, NM(2, 4), 4, rho=rho)
    for _ in range(300):  # one step is one of subspace iteration: with Z held still they end in the exact fit
        loop.fit_jointly()
    Y = loop.X - loop.D
    loop.update()

    L = torch.zeros_like(T)
    for _ in range(300):  # the plain way: one block after the other
        S = torch.linalg.solve(G + rho * eye, (T - L) @ G + rho * Z, left=False)
        L = oracles.weighted_low_rank(T - S, G, 4)
    assert augmented(loop.X - Y, loop.U @ loop.V) <= augmented(S, L) * (1 + 1e-6)


@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
@pytest.mark.parametrize("max_steps", [20, 2000])
def test_either_part_is_nearly_the_best_for_the_other(pattern, max_steps):
    W, gram = layer(48, 64, 1)
    found = run(W, gram, pattern, 4, max_steps=max_steps, effort=1)  # below, little is refitted
    L = found.U.double() @ found.V.double()
    S = oracles.least_squares(W - L, gram.H, found.S != 0)
    now, other_S, other_L = (
        oracles.objective(residual, gram.H)
        for residual in (W - found.S - L, W - S - L, W - found.S - oracles.weighted_low_rank(W - found.S, gram.H, 4))
    )
    assert 0.95 * now < other_S <= now * (1 + 1e-4)
    assert 0.95 * now < other_L <= now * (1 + 1e-4)


# --- what it says of itself ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("schedule", "least"), [("joint", 10), ("paper", 100), ("literal", 100)])
def test_says_whether_it_has_converged(schedule, least):
    stats = run(*layer(48, 64, 1), "2:4", schedule=schedule).stats
    assert stats["converged"] is True
    assert 0 <= stats["support_change"] < 0.01
    assert least <= stats["iterations"] < 2000
    assert stats["rho"] > 0.003


@pytest.mark.parametrize("schedule", ["joint", "paper", "literal"])
def test_stops_at_the_bound_and_says_so(schedule):
    found = run(*layer(48, 64, 1), "2:4", schedule=schedule, max_steps=7)
    assert found.stats["iterations"] == 7
    assert found.stats["converged"] is False
    assert found.stats["relative_error"] < 1


@pytest.mark.parametrize("options", [{"effort": 0.0}, {"effort": -1.0}, {"max_steps": 0}])
def test_refuses_to_do_nothing(options):
    with pytest.raises(InputError, match=next(iter(options))):
        find("3basil")[0].parse_options(options)


def test_goes_by_both_spellings():
    assert find("three-basil")[0] is find("3basil")[0]


def tf32(x):
    """Rounded to the ten bits that tensor cores read of a factor."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


@contextmanager
def products_rounded(_device):
    """What CUDA does within ``rounded_products``, on the CPU."""
    plain = torch.Tensor.addmm_
    torch.Tensor.addmm_ = lambda self, one, other: plain(self, tf32(one), tf32(other))
    try:
        yield
    finally:
        torch.Tensor.addmm_ = plain


def test_rounding_the_product_of_the_loop_costs_nothing(monkeypatch):
    exact = [reached(name, pattern) for name in PROBLEMS for pattern in PATTERNS]
    monkeypatch.setattr(_loop, "rounded_products", products_rounded)
    rounded = [error(*layer(*PROBLEMS[name]), pattern) for name in PROBLEMS for pattern in PATTERNS]
    ratios = [one / other for one, other in zip(rounded, exact, strict=True)]
    assert ratios != [1] * len(ratios)
    assert geometric_mean(ratios) < 1.01
    assert max(ratios) < 1.05


@pytest.mark.gpu
@every_pattern
def test_the_loop_does_not_wait_for_an_accelerator(pattern):
    W, H = oracles.problem(600, 320, 3)  # large enough for a sampled threshold
    chosen = parse_pattern(pattern)
    space = Gram.damped(H.cuda()).coordinates(conditional=True, group=chosen.group)
    loop = Loop(space.to_scaled(W.cuda()), space, chosen, RANK, rho=0.003)
    loop.fit_jointly()
    loop.update()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):  # as many as there are between two looks at the support
            loop.fit_jointly()
            loop.update()
    finally:
        torch.cuda.set_sync_debug_mode("default")
