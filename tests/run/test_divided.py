"""The rows of one weight over several processes: what they find together is what one finds."""

import json
from dataclasses import replace

import pytest
import torch

from processes import SERVER, join, together
from sparlow.algorithms import _registry, algorithms, find, pruner, solve
from sparlow.distributed import Processes, joined
from sparlow.linalg import scales
from sparlow.linalg.gram import Gram
from sparlow.linalg.grid import make_grid
from sparlow.linalg.patterns import parse_pattern
from sparlow.linalg.shared_rows import Ahead, sharing
from sparlow.recipe.allocation import Budget
from sparlow.run.divided import ALL, DividedRows, cost, solve_together, who_solves

OUT, IN = 33, 24  # rows that two or three processes cannot divide evenly


class Layer:
    def __init__(self, *shape):
        self.shape = shape


def problem():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(200, IN, generator=generator) @ torch.randn(IN, IN, generator=generator)
    W = torch.randn(OUT, IN, generator=generator)
    sample = torch.nn.functional.normalize(X[:20])
    return W, Gram.damped(X.T @ X / 100, sample=sample)


def solved(W, name, pattern, rank, options, **stored):
    algorithm, _ = find(name)
    gram = problem()[1]

    def some(rows):
        return solve(algorithm, rows, gram, parse_pattern(pattern), rank, algorithm.parse_options(options), **stored)

    return some if W is None else some(W)


def on_grid(values, levels="auto", *, int8_factors=True):
    return {"grid": make_grid(values, levels, 8), "int8_factors": int8_factors}


CASES = {
    "wanda": ("2:4", 0, {}),
    "magnitude": ("2:4", 0, {}),
    "sparsegpt": ("2:4", 0, {}),
    "alps": ("2:4", 0, {}),
    "3basil": ("2:4", 4, {"effort": 0.3}),
    "3basil paper": ("2:4", 4, {"effort": 0.3, "schedule": "paper", "max_steps": 100}),
    "3basil literal": ("2:4", 4, {"schedule": "literal", "max_steps": 40}),
    "3basil dense": ("dense", 2, {"effort": 0.2}),
    "3basil alone": ("2:4", 0, {"effort": 0.3}),
    "oats": ("2:4", 4, {"rounds": 5}),
    "hassle-free": ("2:4", 4, {"rounds": 4, "prune_steps": 6}),
    "hassle-free sparsegpt": ("2:4", 4, {"rounds": 4, "prune": "sparsegpt"}),
}
GRIDS = {
    "wanda int4": ("2:4", 0, {}, on_grid("int4")),
    "magnitude int8": ("dense", 0, {}, on_grid("int8")),
    "alps int3": ("2:4", 0, {}, on_grid("int3", "half")),
    "sparsegpt int4": ("dense", 0, {}, on_grid("int4")),
    "sparsegpt int3 2:4": ("2:4", 0, {}, on_grid("int3")),
    "3basil int8": ("2:4", 4, {"effort": 0.3}, on_grid("int8")),
    "3basil int3": ("dense", 2, {"effort": 0.2}, on_grid("int3")),
    "3basil int4 2:4": ("2:4", 4, {"effort": 0.2}, on_grid("int4", int8_factors=False)),
    "3basil int2 alone": ("dense", 0, {"effort": 0.2}, on_grid("int2")),
    "3basil factors": ("2:4", 4, {"effort": 0.3}, {"grid": None, "int8_factors": True}),
    "oats int4": ("2:4", 4, {"rounds": 5}, on_grid("int4")),
    "hassle-free int4": ("2:4", 4, {"rounds": 4, "prune_steps": 6}, on_grid("int4")),
}
EXACT = ("wanda", "magnitude")
BOOK_ROWS = 5  # fewer than there are: those that a book is learned from are spread over all processes


@pytest.fixture(autouse=True)
def few_rows_of_a_book(monkeypatch):
    monkeypatch.setattr(scales, "BOOK_ROWS", BOOK_ROWS)


def test_every_method_that_says_it_works_by_rows_is_tried():
    tried = {algorithm.name for algorithm in algorithms() if algorithm.by_rows}
    assert {case.split()[0] for case in CASES} == {case.split()[0] for case in GRIDS} == tried


def told_of(found):
    """What is stored, as JSON can say it."""
    values, factors = found.values, found.factors
    return {
        "parts": [part.tolist() for part in (found.S, found.U, found.V)],
        "grid": values and [values.scale.tolist(), values.levels.tolist()],
        "factors": factors and [factors.U.tolist(), factors.V.tolist()],
        "error": found.stats.relative_error,
    }


def one_of_several(variables, note):
    join(variables)
    torch.set_num_threads(1)
    told = {}
    with joined() as processes:
        for case, (pattern, rank, options) in CASES.items():
            found = solve_together(processes, problem()[0], solved(None, case.split()[0], pattern, rank, options))
            stats = found.stats
            told[case] = [part.tolist() for part in (found.S, found.U, found.V)]
            told[case] += [stats.relative_error, stats.relative_error_per_token, stats.iterations]
        scales.BOOK_ROWS = BOOK_ROWS
        for case, (*asked, stored) in GRIDS.items():
            pattern, rank, options = asked
            solving = solved(None, case.split()[0], pattern, rank, options, **stored)
            told[case] = told_of(solve_together(processes, problem()[0], solving))
        half = solve_together(processes, problem()[0].bfloat16(), solved(None, "wanda", "2:4", 0, {}))
        told["half"] = half.S.float().tolist()
    note.write_text(json.dumps(told))


@pytest.mark.slow
def test_several_find_what_one_finds(tmp_path):
    for size in (2, 3):
        notes = [tmp_path / f"{size}-{rank}" for rank in range(size)]
        given = zip(together(size), notes, strict=True)
        runs = [SERVER.Process(target=one_of_several, args=arguments) for arguments in given]
        for run in runs:
            run.start()
        for run in runs:
            run.join(300)
        assert [run.exitcode for run in runs] == [0] * size
        told = [json.loads(note.read_text()) for note in notes]
        assert all(other == told[0] for other in told)  # all have the same
        W, gram = problem()
        assert torch.equal(torch.tensor(told[0]["half"]), solved(W.bfloat16(), "wanda", "2:4", 0, {}).S.float())
        for case, (pattern, rank, options) in CASES.items():
            expected = solved(W, case.split()[0], pattern, rank, options)
            *parts, error, per_token, iterations = told[0][case]
            S, U, V = (torch.tensor(part).view(shape) for part, shape in zip(parts, _shapes(rank), strict=True))
            assert parse_pattern(pattern).violation("S", S) is None
            assert iterations == expected.stats.iterations, case
            assert error == pytest.approx(expected.stats.relative_error, rel=1e-5), case
            assert error == pytest.approx(gram.relative_error(W, W - S - U @ V), rel=1e-4)  # of the whole weight
            assert per_token == pytest.approx(expected.stats.relative_error_per_token, rel=1e-3), case
            if case in EXACT:
                assert torch.equal(S, expected.S)
        for case, (pattern, rank, options, stored) in GRIDS.items():
            compare_grids(case, told[0][case], solved(W, case.split()[0], pattern, rank, options, **stored))


def compare_grids(case, told, expected):
    """A code may be another where a number lay between two levels, so what is compared is the error of all."""
    W, gram = problem()
    wanted = (expected.S, expected.U, expected.V)
    S, U, V = (torch.tensor(part).view(like.shape) for part, like in zip(told["parts"], wanted, strict=True))
    assert told["error"] == pytest.approx(expected.stats.relative_error, rel=1e-3), case
    assert told["error"] == pytest.approx(gram.relative_error(W, W - S - U @ V), rel=1e-4), case  # of the whole weight
    assert (told["grid"] is None) == (expected.values is None)
    if expected.values is not None:
        like = (expected.values.scale, expected.values.levels)
        scale, levels = (torch.tensor(part).to(one) for part, one in zip(told["grid"], like, strict=True))
        values = replace(expected.values, scale=scale, levels=levels)
        assert torch.equal(values.decode(values.encode(S)) * (S != 0), S), case  # every row on the one grid
        assert scale.shape == expected.values.scale.shape
        torch.testing.assert_close(levels, expected.values.levels, msg=case)
    if expected.factors is not None:
        for part, scale, dim in zip((U, V), told["factors"], (0, 1), strict=True):
            codes = part / torch.tensor(scale).unsqueeze(dim)
            torch.testing.assert_close(codes, codes.round(), atol=1e-3, rtol=0, msg=case)
            assert codes.abs().max() <= 127.001


def _shapes(rank):
    return (OUT, IN), (OUT, rank), (rank, IN)


def test_layers_that_would_keep_all_others_waiting_are_divided_with_those_that_share_their_input():
    budget = Budget(parse_pattern("2:4"), 2)
    shapes = {"q": (32, 32), "o": (32, 32), "gate": (128, 32), "up": (96, 32), "down": (32, 96)}
    layers = {name: (Layer(*shape), budget) for name, shape in shapes.items()}
    owner = {"up": "gate"}
    assert ALL not in who_solves(Processes(), layers, owner, by_rows=True).values()
    two, many = (who_solves(Processes(0, size), layers, owner, by_rows=True) for size in (2, 12))
    assert [name for name, rank in two.items() if rank == ALL] == ["down"]
    assert {two["gate"], two["up"]} == {0, 1}
    assert [name for name, rank in many.items() if rank == ALL] == ["gate", "up", "down"]
    coded = Budget(parse_pattern("2:4"), 2, make_grid("int4"), int8_factors=True)
    assert who_solves(Processes(0, 2), {"down": (Layer(32, 96), coded)}, {}, by_rows=True) == {"down": ALL}
    whole = {"rows": Budget(parse_pattern("0.5"), 4), "rank": Budget(parse_pattern("2:4"), 17)}
    for kept in whole.values():
        assert ALL not in who_solves(Processes(0, 2), {"down": (Layer(32, 96), kept)}, {}, by_rows=True).values()
    assert who_solves(Processes(0, 2), {"down": (Layer(32, 96), budget)}, {}, by_rows=False) == {"down": 0}
    assert cost((32, 96)) == 96**2 * (32 + 96)


def test_a_method_divides_rows_if_the_pruner_that_it_calls_does(monkeypatch):
    found = {}
    for name in ("3basil", "eora", "hassle-free", "hassle-free-sparsegpt"):
        algorithm, implied = find(name)
        found[name] = algorithm.divides_rows(algorithm.parse_options(implied))
    # EoRA is one decomposition of all rows
    assert found == {"3basil": True, "eora": False, "hassle-free": True, "hassle-free-sparsegpt": True}
    monkeypatch.setattr(_registry, "_ALGORITHMS", _registry._ALGORITHMS.copy())
    pruner("over-all-rows")(lambda W, _, pattern: W * pattern.mask(W.abs()))
    algorithm = find("hassle-free")[0]
    assert not algorithm.divides_rows(algorithm.parse_options({"prune": "over-all-rows"}))


def test_what_is_needed_next_is_found_ahead_and_each_finds_its_own():
    class Noting(DividedRows):
        def sent(self, tensor, source):
            sent.append(source)
            return tensor

    sent, found = [], []
    ahead = Ahead(lambda x: found.append(x) or torch.tensor(x))
    rho = 0.003
    with sharing(Noting(Processes(1, 3), 6)):
        for _ in range(4):
            ahead.at(rho, 1.2)
            rho *= 1.2
    assert sent == [0, 1, 2, 0]
    assert found == [0.003 * 1.2, 0.003 * 1.2 * 1.2 * 1.2 * 1.2]
    assert Ahead(lambda x: x).at(2.0, 1.0) == 2.0  # alone it is found when it is asked for
