"""The rows of one weight over several processes: what they find together is what one finds."""

import json

import pytest
import torch

from processes import SERVER, join, together
from sparlow.algorithms import algorithms, find, solve
from sparlow.distributed import Processes, joined
from sparlow.linalg.gram import Gram
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


def solved(W, name, pattern, rank, options):
    algorithm, _ = find(name)
    gram = problem()[1]

    def some(rows):
        return solve(algorithm, rows, gram, parse_pattern(pattern), rank, algorithm.parse_options(options))

    return some if W is None else some(W)


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
}
EXACT = ("wanda", "magnitude")


def test_every_method_that_says_it_works_by_rows_is_tried():
    assert {case.split()[0] for case in CASES} == {algorithm.name for algorithm in algorithms() if algorithm.by_rows}


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


def _shapes(rank):
    return (OUT, IN), (OUT, rank), (rank, IN)


def test_layers_that_would_keep_all_others_waiting_are_divided_with_those_that_share_their_input():
    algorithm, budget = find("3basil")[0], Budget(parse_pattern("2:4"), 2)
    shapes = {"q": (32, 32), "o": (32, 32), "gate": (128, 32), "up": (96, 32), "down": (32, 96)}
    layers = {name: (Layer(*shape), budget) for name, shape in shapes.items()}
    owner = {"up": "gate"}
    assert ALL not in who_solves(Processes(), algorithm, layers, owner).values()
    two, many = (who_solves(Processes(0, size), algorithm, layers, owner) for size in (2, 12))
    assert [name for name, rank in two.items() if rank == ALL] == ["down"]
    assert {two["gate"], two["up"]} == {0, 1}
    assert [name for name, rank in many.items() if rank == ALL] == ["gate", "up", "down"]
    whole = {"rows": Budget(parse_pattern("0.5"), 4), "rank": Budget(parse_pattern("2:4"), 17)}
    for kept in whole.values():
        assert ALL not in who_solves(Processes(0, 2), algorithm, {"down": (Layer(32, 96), kept)}, {}).values()
    oats = find("oats")[0]  # takes a decomposition of all rows
    assert who_solves(Processes(0, 2), oats, {"down": (Layer(32, 96), budget)}, {}) == {"down": 0}
    assert cost((32, 96)) == 96**2 * (32 + 96)


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
