"""Magnitude pruning: the baseline of baselines, and the smallest file to copy for an algorithm of your own."""

from torch import Tensor

from sparlow.algorithms._registry import pruner
from sparlow.linalg.gram import Gram
from sparlow.linalg.patterns import Pattern


@pruner("magnitude", usual=True, by_rows=True)
def magnitude(W: Tensor, gram: Gram, pattern: Pattern) -> Tensor:
    """Keep the largest |W_ij|; look at no data."""
    del gram
    return W * pattern.mask(W.abs())
