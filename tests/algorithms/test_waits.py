"""Between two looks no solver waits for the device, and nothing that it asks for is as large as the data say."""

import pytest
import torch

from sparlow.algorithms import algorithms, find, solve
from sparlow.linalg.gram import Gram
from sparlow.linalg.grid import make_grid
from sparlow.linalg.patterns import parse_pattern
from waits import Counting

# By steps: a loop looks at its support, and factorises for the next ρ, once in so many at most.
EVERY = {"3basil": 5, "alps": 3, "hassle-free": 3}
BESIDE = 30  # looks before and after: at what was given, what was found, and its error
QUICK = {"3basil": {"effort": 0.5}, "hassle-free": {"rounds": 3}}


@pytest.mark.parametrize("values", ["model", "int4", "int3"])
@pytest.mark.parametrize("name", [algorithm.name for algorithm in algorithms()])
def test_a_solver_waits_for_the_device_between_looks_only(name, values):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(512, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    W, gram = torch.randn(48, 64, generator=generator), Gram.damped(X.T @ X)
    algorithm, fixed = find(name)
    rank = 0 if algorithm.kind == "pruner" else 8
    grid = make_grid(values, "auto", 32)
    with Counting() as counting:
        found = solve(
            algorithm, W, gram, parse_pattern("2:4"), rank, {**fixed, **QUICK.get(name, {})}, grid=grid,
            int8_factors=grid is not None and rank > 0,
        )  # fmt: skip
    waits = counting.waits
    assert waits.keys() == {"_local_scalar_dense"}
    looks = 2 * found.stats.iterations / EVERY[name] if name in EVERY else 0
    levels = 0 if grid is None else 10 * 2**grid.bits  # which are constants, and lie on the CPU
    assert waits["_local_scalar_dense"] <= BESIDE + looks + levels
