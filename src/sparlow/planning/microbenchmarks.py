"""Measure this machine and an algorithm on small layers: seconds and bytes as formulas in (out, in).

No algorithm is known here by name. What each needs is a product with a Gram matrix for every step (out·in²), work on
the Gram matrix alone (in³, which layers with the same input share), and passes over the weight (out·in); what it holds
are matrices (in, in) and (out, in). So a few small layers tell the factors, and the shapes of a model the rest.
"""

import hashlib
import itertools
import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparlow.algorithms import solve
from sparlow.linalg.error_curves import error_curve
from sparlow.linalg.gram import RIDGES_KEPT, Gram
from sparlow.linalg.portions import standing_for_a_larger
from sparlow.linalg.rounding import SAMPLE
from sparlow.recipe.allocation import Budget, Shape, offered
from sparlow.recipe.recipe import Recipe

FLOAT = 4  # bytes: solvers compute in float32
SMALLEST, LARGEST = 64, 1024  # sides of the layers tried
ON_A_GRID = 128  # the same where values are on a grid, of which columns share scales and are rounded together
STANDS_FOR = 2**6  # times as many entries has a layer whose memory matters
SECONDS = 8.0  # that the layers may take
WATCHED = 3.0  # seconds for which the bytes of a layer are followed: loops repeat themselves
MORE = 4  # times as long a small layer of twice the side takes, for which calls count as much as products
AGAIN = 0.5  # seconds; what takes less is timed twice, as what else runs on the machine only adds to it
PRODUCT = 1024  # side of the product that is timed
BUFFER = 2**24  # bytes that are hashed and copied


@dataclass(frozen=True)
class Workspace:
    """Bytes that solving a layer (out, in) takes beyond its weight, including its damped Gram matrix.

    Attributes:
        square: Times in².
        matrix: Times out·in.
        levels: Inverses that a Gram would like to remember for the layers that share it.
        looked_at: Bytes for each entry that a book of levels is learned from, which are ``SAMPLE`` at most; a small
            layer takes no less than these.
    """

    square: float
    matrix: float
    levels: int
    looked_at: float = 0.0

    def remembered(self, features: int) -> int:
        """Bytes of the inverses that a Gram of this many features caches."""
        each = FLOAT * features**2
        kept: int = min(self.levels, RIDGES_KEPT // each) * each
        return kept

    def bytes(self, shape: Shape) -> int:
        """Return the value for one layer (out, in)."""
        rows, columns = shape
        grows = self.square * columns**2 + self.matrix * rows * columns
        return round(max(grows, self.looked_at * min(rows * columns, SAMPLE))) + self.remembered(columns)


# More than any algorithm here takes (test_microbenchmarks.py); where this fits, nothing needs to be measured.
BOUND = Workspace(square=8 * FLOAT, matrix=20 * FLOAT, levels=64)


@dataclass(frozen=True)
class Speed:
    """Of this machine, with the threads torch has.

    Attributes:
        products: Operations a second in matrix products, in the type blocks compute in.
        memory: Bytes a second that are read and written again.
        hashing: Bytes a second through sha256.
    """

    products: float
    memory: float
    hashing: float


@dataclass(frozen=True)
class Solver:
    """Seconds that solving a layer (out, in) takes.

    Attributes:
        product: Times out·in².
        gram: Times in³, once for layers that share their input.
        entry: Times out·in.
        call: Of any layer, however small.
        largest: Side of the largest layer that was tried.
    """

    product: float
    gram: float
    entry: float
    call: float
    largest: int

    def seconds(self, shape: Shape, *, first: bool) -> float:
        """Of one layer (out, in); ``first`` of those that share its input."""
        rows, columns = shape
        shared = self.gram * columns**3 if first else 0.0
        return self.product * rows * columns**2 + shared + self.entry * rows * columns + self.call


class _Enough(Exception):  # noqa: N818 - control flow of our own; never leaves this module
    """Stops a solve that was followed for long enough."""


class _LiveBytes(TorchDispatchMode):
    """Tracks the bytes of tensors that are created inside. Memory that kernels allocate internally is not seen."""

    def __init__(self, *given: Tensor, seconds: float = float("inf")) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in torch
        self.peak: int = 0
        self._end = time.perf_counter() + seconds
        self._now = 0  # at most: what has died is counted until that matters
        self._given = {t.untyped_storage()._cdata for t in given}  # noqa: SLF001 - the identity of a storage
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204 - torch's form
        if time.perf_counter() > self._end:
            raise _Enough
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata  # noqa: SLF001 - see above
        if key in self._live or key in self._given:
            return
        self._live[key] = (StorageWeakRef(storage), storage.nbytes())
        self._now += storage.nbytes()
        if self._now > self.peak:
            self._live = {key: held for key, held in self._live.items() if not held[0].expired()}
            self._now = sum(size for _, size in self._live.values())
            self.peak = max(self.peak, self._now)


def typical(budgets: Sequence[tuple[Shape, Budget]]) -> tuple[Shape, Budget]:
    """Return the layer of median work. Smaller layers of its kind are tried."""
    return sorted(budgets, key=lambda pair: pair[0][0] * pair[0][1] ** 2)[len(budgets) // 2]


def workspace(recipe: Recipe, like: tuple[Shape, Budget], stored: torch.dtype) -> Workspace:
    """Measure the memory that the recipe's algorithm holds while it solves, on three small layers.

    Args:
        recipe: Its algorithm and options.
        like: Shape and budget of a layer; the small ones have its pattern and as large a rank for their size.
        stored: Type of the weights.
    """
    shapes = _shapes(_fitting(ON_A_GRID if like[1].grid else SMALLEST, like[1]))
    with standing_for_a_larger(STANDS_FOR):
        peaks = [_followed(recipe, like, shape, stored) for shape in shapes]
    square, matrix = _non_negative([[shape[1] ** 2, shape[0] * shape[1]] for shape in shapes], peaks)
    looked_at = _followed(recipe, like, shapes[0], stored) / math.prod(shapes[0]) if like[1].grid else 0.0
    return Workspace(square, matrix, _levels(recipe, like), looked_at)


def _followed(recipe: Recipe, like: tuple[Shape, Budget], shape: Shape, stored: torch.dtype) -> float:
    """Return the most bytes that a solve of a layer of this shape holds, in ``WATCHED`` seconds at least."""
    budget = _scaled(like, shape)
    W, H = _problem(shape, torch.device("cpu"))
    W = W.to(stored)
    seen = _LiveBytes(W, H, seconds=WATCHED)
    with suppress(_Enough), seen:
        _solve(recipe, W, H, budget, remember=0)
    peak = max(seen.peak, H.nbytes)  # the damped Gram matrix, if nothing else was seen
    if recipe.allocate == "error":
        peak = max(peak, _error_curve_peak(W, H, budget))
    return float(peak)


def _levels(recipe: Recipe, like: tuple[Shape, Budget]) -> int:
    """Return how many inverses a solve leaves to the next; where that would take long to see, as many as fit."""
    shape = _square(_fitting(SMALLEST, like[1]))[0]
    W, H = _problem(shape, torch.device("cpu"))
    with suppress(_Enough), _LiveBytes(W, H, seconds=WATCHED):
        return int(_solve(recipe, W, H, _scaled(like, shape)).remembered // H.nbytes)
    return BOUND.levels


def _error_curve_peak(W: Tensor, H: Tensor, budget: Budget) -> int:
    with _LiveBytes(W, H) as seen:
        gram = Gram.damped(H)
        shape = (W.shape[0], W.shape[1])
        for pattern, ranks in offered(budget, shape, W.element_size(), low_rank=budget.rank > 0).items():
            error_curve(W.float(), gram, pattern, ranks, budget.grid)
    return int(seen.peak)


def solver(recipe: Recipe, like: tuple[Shape, Budget], device: torch.device) -> Solver:
    """Time the recipe's algorithm on layers of growing size, until ``SECONDS`` would be exceeded."""
    start, side = time.perf_counter(), _fitting(SMALLEST, like[1])
    top = min(LARGEST, max(min(like[0]), 2 * side))
    first = _timed(recipe, like, (side, side), device)  # the first call of anything takes longer
    shapes = _shapes if MORE * first < SECONDS else _square
    rows, seconds = [], []
    while True:
        begun = time.perf_counter()
        for out, features in shapes(side):
            rows.append([out * features**2, features**3, out * features, 1.0])
            seconds.append(_timed(recipe, like, (out, features), device))
        last, spent = time.perf_counter() - begun, time.perf_counter() - start
        enough = len(rows) > len(shapes(side)) and spent + MORE * last > SECONDS
        if 2 * side > top or enough:
            break
        side *= 2
    tail = slice(-2 * len(shapes(side)), None)  # the largest two sides
    product, gram, entry, call = _non_negative(rows[tail], seconds[tail])
    return Solver(product, gram, entry, call, side)


def speed(device: torch.device, computing: torch.dtype) -> Speed:
    """Measure the speed of products, copies and hashes, in about half a second."""
    A = torch.randn(PRODUCT, PRODUCT, device=device).to(computing)
    out = torch.empty_like(A)
    x = torch.zeros(BUFFER // FLOAT, device=device)
    y, text = torch.empty_like(x), bytes(BUFFER)
    return Speed(
        products=2 * PRODUCT**3 / _best(lambda: torch.mm(A, A, out=out), device),
        memory=2 * BUFFER / _best(lambda: torch.neg(x, out=y), device),
        hashing=BUFFER / _best(lambda: hashlib.sha256(text), device),
    )


def _shapes(side: int) -> list[Shape]:
    """Return a square, a wide and a tall shape, for three unknowns."""
    return [(side, side), (side // 2, side), (side, side // 2)]


def _square(side: int) -> list[Shape]:
    """Return a square shape only, for methods that take seconds on the smallest layer."""
    return [(side, side)]


def _fitting(side: int, budget: Budget) -> int:
    """Two times a multiple of the pattern's group, at least ``side``."""
    group = 2 * (budget.pattern.group or 1)
    return -(-side // group) * group


def _scaled(like: tuple[Shape, Budget], shape: Shape) -> Budget:
    """The budget of a smaller layer: the same pattern, and a rank that is as large beside its sides."""
    whole, budget = like
    rank = min(round(budget.rank * min(shape) / min(whole)), *shape)
    return replace(budget, rank=max(rank, 1) if budget.rank else 0)


def _problem(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    """A weight (out, in) and a Gram matrix (in, in) with a spectrum that falls off, as those of activations do."""
    rows, columns = shape
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(rows, columns, generator=generator)
    X = torch.randn(2 * columns, columns, generator=generator) / torch.arange(1, columns + 1).sqrt()
    X = X @ torch.linalg.qr(torch.randn(columns, columns, generator=generator)).Q
    return W.to(device), (X.T @ X).to(device)


def _solve(recipe: Recipe, W: Tensor, H: Tensor, budget: Budget, *, remember: int = RIDGES_KEPT) -> Gram:
    gram = Gram.damped(H, absolute=recipe.damping, relative=recipe.relative_damping, remember=remember)
    solve(recipe.found_algorithm, W, gram, budget.pattern, budget.rank, recipe.parsed_options, **budget.on_grid)
    return gram


def _timed(recipe: Recipe, like: tuple[Shape, Budget], shape: Shape, device: torch.device) -> float:
    first = _once(recipe, like, shape, device)
    return min(first, _once(recipe, like, shape, device)) if first < AGAIN else first


def _once(recipe: Recipe, like: tuple[Shape, Budget], shape: Shape, device: torch.device) -> float:
    W, H = _problem(shape, device)
    _wait(device)
    start = time.perf_counter()
    _solve(recipe, W, H, _scaled(like, shape))
    _wait(device)
    return time.perf_counter() - start


def _best(call: Callable[[], object], device: torch.device) -> float:
    """Return the shortest of several times, since other load on the machine only adds to it."""
    times = []
    for _ in range(5):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - start)
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _non_negative(rows: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
    """Factors, none below zero, by which the columns of ``rows`` come nearest to ``values``, relative to each.

    The columns are few, so all subsets are tried: the least squares solution is the best one of those without a
    negative factor.
    """
    A = torch.tensor(rows, dtype=torch.float64) / torch.tensor(values, dtype=torch.float64)[:, None]
    size = A.norm(dim=0)
    best, found = float("inf"), [0.0] * A.shape[1]
    for count in range(1, A.shape[1] + 1):
        for chosen in itertools.combinations(range(A.shape[1]), count):
            part = (A / size)[:, chosen]
            x = torch.linalg.lstsq(part, torch.ones(len(A), 1, dtype=torch.float64)).solution[:, 0]
            error = float((part @ x - 1).square().sum())
            if (x >= 0).all() and error < best:
                best, found = error, [0.0] * A.shape[1]
                for column, factor in zip(chosen, (x / size[list(chosen)]).tolist(), strict=True):
                    found[column] = factor
    return found
