"""Which entries of a weight may survive. A pattern turns scores into a mask; True means kept.

Only this file knows what 2:4 or 50 % mean. Every mask keeps exactly as many entries as the pattern allows. Of equal
scores, the first wins.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from torch import Tensor

from sparlow.errors import InputError
from sparlow.linalg.selection import Selection
from sparlow.schema import shown

EVERYTHING = "dense"  # the pattern that prunes nothing
Projector = Callable[[Tensor, Tensor], Tensor]  # (X, out), contiguous → out: X, zero where it is pruned


@dataclass(frozen=True, slots=True)
class Unstructured:
    """Remove the fraction ``sparsity`` of the entries with the smallest scores, wherever they are.

    Args:
        sparsity: Fraction of the entries that is removed, in [0, 1).
        per_row: Rank the scores row by row (as Wanda does) instead of over the whole matrix.
    """

    sparsity: float
    per_row: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise InputError(f"A sparsity of {self.sparsity:g} is not possible. Give a fraction from 0 up to below 1.")

    def __str__(self) -> str:
        return str(self.sparsity) if self.sparsity else EVERYTHING

    @property
    def density(self) -> float:
        """Fraction of the entries that is kept."""
        return 1 - self.sparsity

    @property
    def group(self) -> None:
        """None: the pattern does not choose within groups of columns."""

    def check(self, shape: tuple[int, int]) -> None:
        """Accept every shape: a fraction can be taken of any matrix."""

    def kept(self, shape: tuple[int, int]) -> int:
        """Entries kept of a matrix of this shape."""
        rows, columns = shape
        return rows * self._kept_of(columns) if self.per_row else self._kept_of(rows * columns)

    def _kept_of(self, entries: int) -> int:
        """Round down for a single row, so that all rows together never keep more than the whole matrix may."""
        kept = self.density * entries
        return math.floor(kept + 1e-9) if self.per_row else round(kept)

    def mask(self, scores: Tensor) -> Tensor:
        """Mark the largest ``scores`` (out, in), which are not negative; bool (out, in)."""
        groups = scores if self.per_row else scores.reshape(1, -1)
        return _largest(groups, self._kept_of(groups.shape[1])).reshape(scores.shape)

    def mask_of_columns(self, scores: Tensor, first: int, columns: int) -> Tensor:
        """Mark the largest ``scores`` (out, width) of the columns from ``first`` on, in a matrix that has ``columns``.

        Every range of columns keeps its share. Together they keep exactly as many entries as ``mask`` does.
        """
        groups = scores if self.per_row else scores.reshape(1, -1)
        width = scores.shape[1]
        whole = self._kept_of(groups.shape[1] // width * columns)
        before, after = (whole * column // columns for column in (first, first + width))
        return _largest(groups, after - before).reshape(scores.shape)

    def violation(self, name: str, S: Tensor) -> str | None:
        """Say in one sentence how ``S`` (out, in) breaks the pattern, or return None."""
        kept, allowed = int((S != 0).sum()), self.kept((S.shape[0], S.shape[1]))
        return f"{name} keeps {kept} values where {self} allows {allowed}." if kept > allowed else None

    def projector(self) -> Projector:
        """Return the projection of a solver's iterates X (out, in): cheaper than ``mask`` and a product.

        Approximate: an exact top-k costs more than an iteration's product, so the threshold is estimated from a sample.
        Finish with an exact ``mask``.
        """
        if self.sparsity == 0:
            return _copy
        return self._project if self.per_row else _SampleProjector(self.density)

    def _project(self, X: Tensor, out: Tensor) -> Tensor:
        return out.copy_(self.mask(X.abs())).mul_(X)


@dataclass(frozen=True, slots=True)
class NM:
    """Keep the ``n`` largest of every ``m`` consecutive entries of a row: ``NM(2, 4)`` keeps two of four."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n <= self.m:
            raise InputError(f"Pattern {self.n}:{self.m} keeps {self.n} of {self.m}. Give N:M with 0 < N <= M.")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def density(self) -> float:
        """Fraction of the entries that is kept."""
        return self.n / self.m

    @property
    def group(self) -> int:
        """Number of consecutive columns among which the pattern chooses."""
        return self.m

    def check(self, shape: tuple[int, int]) -> None:
        """Raise InputError unless the input dimension of ``shape`` (out, in) is a multiple of m."""
        if shape[1] % self.m:
            raise InputError(
                f"Pattern {self} needs a multiple of {self.m} input features, and this layer has {shape[1]}. "
                "Choose another pattern."
            )

    def kept(self, shape: tuple[int, int]) -> int:
        """Entries kept of a matrix of this shape."""
        return shape[0] * shape[1] // self.m * self.n

    def mask(self, scores: Tensor) -> Tensor:
        """Mark the n largest of every m ``scores`` (out, in); bool (out, in).

        No sort: every pair in a group is compared once, and an entry is kept if fewer than n others beat it.
        """
        members = scores.reshape(-1, self.m).unbind(1)  # m tensors (groups,)
        counter = torch.uint8 if self.m < 256 else torch.int32  # noqa: PLR2004 - what a byte counts up to
        losses = [torch.zeros(members[0].shape, dtype=counter, device=scores.device) for _ in members]
        for i, j in combinations(range(self.m), 2):
            first_wins = members[i] >= members[j]  # a tie goes to the first
            losses[j] += first_wins
            losses[i] += ~first_wins
        return torch.stack([lost < self.n for lost in losses], dim=1).reshape(scores.shape)

    def mask_of_columns(self, scores: Tensor, first: int, columns: int) -> Tensor:
        """Return ``mask`` of the ``scores`` (out, width) of whole groups: each group is chosen by itself."""
        del first, columns
        return self.mask(scores)

    def violation(self, name: str, S: Tensor) -> str | None:
        """Say in one sentence how ``S`` (out, in) breaks the pattern, or return None."""
        groups = int(((S != 0).reshape(-1, self.m).sum(1) > self.n).sum())
        return f"{name} keeps more than {self.n} of {self.m} in {groups} groups." if groups else None

    def projector(self) -> Projector:
        """Return the projection of a solver's iterates, their columns interleaved (``linalg/coordinates.py``).

        It keeps every one of equal entries, so it may keep too many. Finish with an exact ``mask``.
        """
        return _GroupProjector(self.n, self.m)


Pattern = Unstructured | NM


def parse_pattern(text: str) -> Pattern:
    """Read ``"2:4"`` (keep 2 of every 4), ``"0.5"`` (remove half) or ``"dense"`` (remove nothing).

    Raises:
        InputError: It is anything else.
    """
    if text == EVERYTHING:
        return Unstructured(0.0)
    try:
        if ":" in text:
            n, m = text.split(":")
            return NM(int(n), int(m))
        return Unstructured(float(text))
    except InputError:
        raise
    except ValueError:
        raise InputError(
            f"Pattern {shown(text)} is not understood{_meant(text)} Give N:M such as 2:4, the fraction removed, such "
            f"as 0.5, or {EVERYTHING}."
        ) from None


def _meant(text: str) -> str:
    """End a sentence with the pattern that a slip may stand for: 2;4, 2of4 or 50 %."""
    groups = re.fullmatch(r"\s*(\d{1,4})[^\d.]{1,3}(\d{1,4})\D?\s*", text)
    share = re.fullmatch(r"\s*(\d{1,2}(?:\.\d{1,6})?)\s*%\s*", text)
    near = f"{groups[1]}:{groups[2]}" if groups else f"{float(share[1]) / 100:g}" if share else ""
    return f"; did you mean {near!r}?" if near else "."


def within_rows(pattern: Pattern) -> Pattern:
    """Return the pattern with scores compared within each row, as some papers do. N:M always does."""
    return replace(pattern, per_row=True) if isinstance(pattern, Unstructured) else pattern


def _copy(X: Tensor, out: Tensor) -> Tensor:
    return out.copy_(X)


def _largest(scores: Tensor, count: int) -> Tensor:
    """Mark exactly ``count`` entries in every row of ``scores`` (rows, columns)."""
    if count == scores.shape[1]:
        return torch.ones_like(scores, dtype=torch.bool)
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = _kth_largest(scores, count)  # (rows, 1)
    mask = scores > threshold
    missing = count - mask.sum(1, keepdim=True)
    ties = scores == threshold
    return mask | (ties & (ties.cumsum(1, dtype=torch.int32) <= missing))


def _kth_largest(scores: Tensor, k: int) -> Tensor:
    """Return the k-th largest of every row of ``scores`` (rows, columns), as (rows, 1)."""
    position = scores.shape[1] - k
    if scores.device.type != "cpu":
        # torch.kthvalue takes 300 times as long (benchmarks/accelerator.py)
        return scores.topk(k, dim=1, sorted=False).values.min(dim=1, keepdim=True).values
    import numpy as np

    # numpy.partition takes 3.6 ms where torch.topk takes 90 (1536 × 576; torch 2.13 on two cores)
    exact = scores.detach() if scores.dtype == torch.float64 else scores.detach().float()  # numpy knows no bfloat16
    values = np.partition(exact.numpy(), position, axis=1)[:, position : position + 1]
    return torch.from_numpy(values).to(scores.dtype)


class _GroupProjector:
    """Keep the entries of X that reach the n-th largest magnitude of their group of m.

    The columns of X are interleaved (``linalg/coordinates.py``), so member k of all groups is contiguous in a row.
    Several rows are looked at together, few enough for the cache of a processor. The mask is made of floats. All this
    is for speed: torch takes several times as long for short stretches, and for comparisons that give bools.
    """

    AT_ONCE, AT_ONCE_ON_DEVICE = 2**19, 2**24  # entries

    def __init__(self, n: int, m: int) -> None:
        self.n, self.m = n, m
        self._shape: tuple[int, ...] = ()  # of the last X; new memory for each call costs more than comparisons
        self._rows = 0

    def __call__(self, X: Tensor, out: Tensor) -> Tensor:
        if X.shape != self._shape:
            self._prepare(X)
        for start in range(0, len(X), self._rows):
            first = min(start, len(X) - self._rows)  # the last rows may come twice, which changes nothing
            self._project(X[first : first + self._rows], out[first : first + self._rows])
        return out

    def _prepare(self, X: Tensor) -> None:
        rows, columns = X.shape
        most = self.AT_ONCE if X.device.type == "cpu" else self.AT_ONCE_ON_DEVICE
        self._shape, self._rows = X.shape, math.ceil(rows / math.ceil(X.numel() / max(most, columns)))
        self._nth_largest = Selection(self.n, self.m, (self._rows, columns // self.m), X)

    def _project(self, X: Tensor, out: Tensor) -> None:
        sizes = torch.abs(X, out=out).view(len(X), self.m, -1)
        sizes.ge_(self._nth_largest(sizes.transpose(0, 1)).unsqueeze(1))
        out.mul_(X)


class _SampleProjector:
    """Keep the entries of X that reach a threshold, which is the k-th largest magnitude of an evenly spaced sample.

    The number of kept entries is off by a few in a thousand (a few in a hundred at 90 %). The sample is always the
    same, so that the support can settle. A matrix of fewer than 2 ``SAMPLE`` entries is not sampled, but used whole.
    """

    SAMPLE = 2**16

    def __init__(self, density: float) -> None:
        self.density = density

    def __call__(self, X: Tensor, out: Tensor) -> Tensor:
        scores = torch.abs(X, out=out)
        stride = max(scores.numel() // self.SAMPLE, 1)
        while math.gcd(stride, scores.shape[1]) > 1:  # or it would see the same few columns of every row
            stride += 1
        sample = scores.view(1, -1)[:, ::stride].contiguous()
        threshold = _kth_largest(sample, max(round(self.density * sample.shape[1]), 1))
        return scores.ge_(threshold).mul_(X)  # numbers: torch takes several times as long for bools
