"""A layer to try a method on, and a method run on it: what the tests of all methods share."""

import oracles
from sparlow.algorithms import find, solve
from sparlow.linalg.gram import Gram
from sparlow.linalg.patterns import parse_pattern


def layer(out=24, inp=40, seed=0, **changes):
    """W (out, in) and the damped Gram of its inputs."""
    W, H = oracles.problem(out, inp, seed, **changes)
    return W, Gram.damped(H)


def in_float64(W, gram):
    """The same layer, in which rounding decides between no two scores."""
    return W.double(), Gram(gram.H.double(), gram.dead)


def run(name, W, gram, pattern, rank=0, **options):
    """Solve by a name or an alias, with its options as a user gives them."""
    algorithm, implied = find(name)
    return solve(algorithm, W, gram, parse_pattern(pattern), rank, algorithm.parse_options(implied | options))
