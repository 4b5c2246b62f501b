"""Cases of a law of which a few stand for all in `make test`, and all of which `make test-slow` completes."""

import pytest


def few_of(cases, *quick):
    """All cases as parameters of a test; those that are not among ``quick`` are marked slow."""
    cases = list(cases)
    missing = [case for case in quick if case not in cases]
    assert not missing, missing
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=() if case in quick else pytest.mark.slow)
        for case in cases
    ]
