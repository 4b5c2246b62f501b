"""The thin shell around every algorithm: what is checked before and after, the same for all."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparlow.algorithms._registry import Algorithm, find
from sparlow.algorithms._results import Decomposition, Pruned, SolveStats
from sparlow.algorithms._stored import as_stored, off_grid, on_grid
from sparlow.errors import InputError, RunError
from sparlow.finite import all_finite
from sparlow.linalg.factors import stored_factors
from sparlow.linalg.gram import Gram
from sparlow.linalg.grid import GROUP, Grid, make_grid
from sparlow.linalg.grid_fit import metric
from sparlow.linalg.grid_target import GridTarget, Storage
from sparlow.linalg.patterns import Pattern, parse_pattern
from sparlow.linalg.shared_rows import largest
from sparlow.linalg.tf32 import exact_products, unit
from sparlow.own_settings import own_settings
from sparlow.schema import unknown

# Part of every run's fingerprint in the place of the package's version: a run that was begun with another number is
# refused. Raise it whenever the same recipe, model and text may give other bits than before: a change of any algorithm
# or of its default options, of the statistics, of allocation, matching or fine-tuning. Leave it for everything else.
REVISION = 4


FACTORS = ("auto", "model", "int8")  # types of U and V


@exact_products()
@torch.no_grad()
def solve(
    algorithm: Algorithm,
    W: Tensor,
    gram: Gram,
    pattern: Pattern,
    rank: int,
    options: Mapping[str, Any],
    *,
    grid: Grid | None = None,
    int8_factors: bool = False,
) -> Decomposition:
    """Run one algorithm on one weight.

    Args:
        algorithm: From ``find``; a pruner takes rank 0 only.
        W: Weight (out, in), any float type; solved in float32.
        gram: Of the layer's inputs (in, in), on W's device.
        pattern: Which entries of S may survive.
        rank: Rank of the low-rank part, 0 to min(out, in).
        options: The algorithm's own, parsed.
        grid: Which the values of S are put on; None for values of W's type.
        int8_factors: Whether U and V are rounded to int8.

    Returns:
        S, U, V in W's type and device, and ``stats``, whose ``relative_error`` is that of exactly these S, U, V;
        ``relative_error_per_token`` is there where the Gram has a sample of tokens. With a grid, S is what ``values``
        decodes to, in W's type; with factors in int8, U and V are what ``factors`` says of them, in W's type.

    Raises:
        InputError: W and the rest do not fit together, or W is not finite.
        RunError: The result is not finite, or does not have the pattern, rank or shape that was asked for.
    """
    check(algorithm, W, gram, pattern, rank)
    start = time.perf_counter()
    # a power of two: no bit is lost, and no factor of W can lead out of the range of float32
    size = largest(unit(_wide(W)))
    weight = (_wide(W) / size).float().contiguous() * ~gram.dead  # an input that is always zero needs no weight
    storage = Storage(W.dtype, size)
    target = GridTarget(grid, pattern.density < 1, storage, int8_factors) if grid else None
    rest: list[Any] = [rank] if algorithm.kind == "decomposer" else []
    rest += [target] if target is not None and algorithm.takes_grid else []
    with _kept_whole(algorithm, weight, gram.H):
        answer = algorithm.function(weight, gram, pattern, *rest, **options)
    found = _as_decomposition(algorithm, answer, W)
    check_form(algorithm, found, W, rank)
    if target is not None:
        found = on_grid(weight, gram, found, target)
    elif int8_factors:
        parts = stored_factors(weight - found.S, metric(gram), found.U, found.V, storage, int8=True)
        found = replace(found, U=parts[0], V=parts[1], factors=parts[2])
    stored = as_stored(found, W.dtype, storage)
    stats = replace(found.stats, damping=largest(gram.extra_damping), dead_columns=int(gram.dead.sum()))
    stats = _measured(stats, stored, weight, gram, size, masked=target is not None)
    if not (all(all_finite(part) for part in (stored.S, stored.U, stored.V)) and math.isfinite(stats.relative_error)):
        raise RunError(f"{algorithm.name} ended in values that are not finite. Raise --damping.")
    for what, wrong in (("broke the pattern", pattern.violation("S", stored.S)), ("left the grid", off_grid(stored))):
        if wrong:
            raise RunError(f"{algorithm.name} {what}: {wrong} {_FAULT}")
    return replace(stored, stats=replace(stats, seconds=time.perf_counter() - start))


def _measured(
    stats: SolveStats, found: Decomposition, weight: Tensor, gram: Gram, size: float, *, masked: bool
) -> SolveStats:
    """Return the statistics with the errors of exactly these S, U, V, which are those of ``weight`` times ``size``.

    Where a grid has no zero, inputs that are always zero are ``masked``.
    """
    residual = weight - (_wide(found.S) / size).float() - _wide(found.U).float() @ (_wide(found.V) / size).float()
    if masked:
        residual *= ~gram.dead
    return replace(
        stats,
        relative_error=gram.relative_error(weight, residual),
        relative_error_per_token=gram.relative_error_per_token(weight, residual),
    )


def _wide(x: Tensor) -> Tensor:
    """Return ``x`` in float32, or as it is in float64, whose range may be needed to scale it."""
    return x if x.dtype == torch.float64 else x.float()


@contextmanager
def _kept_whole(algorithm: Algorithm, *given: Tensor) -> Iterator[None]:
    """Within this context an algorithm runs; RunError if a factorisation fails, or it changes what it was given."""
    versions = [tensor._version for tensor in given]  # noqa: SLF001 - how torch counts changes in place
    try:
        yield
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # it is there, and documented
        raise RunError(f"{algorithm.name} failed in a factorisation ({error}). Raise --damping.") from error
    if [tensor._version for tensor in given] != versions:  # noqa: SLF001 - the same
        raise RunError(f"{algorithm.name} changed W or H in place. Let the algorithm work on a copy.")


def _as_decomposition(algorithm: Algorithm, answer: Any, W: Tensor) -> Decomposition:  # noqa: ANN401 - it is checked later
    """Return what an algorithm has found as a decomposition, that of a pruner with a low-rank part of rank 0."""
    if algorithm.kind == "decomposer":
        return answer  # type: ignore[no-any-return]
    pruned = Pruned.of(answer)
    U, V = W.new_zeros(W.shape[0], 0, dtype=torch.float32), W.new_zeros(0, W.shape[1], dtype=torch.float32)
    return Decomposition(pruned.S, U, V, pruned.stats, pruned.values)


_FAULT = "Correct the algorithm, or choose another."


def check_form(algorithm: Algorithm, found: object, W: Tensor, rank: int) -> None:
    """Raise RunError unless a result has the form that was asked for: what else it is worth, its numbers say.

    Args:
        algorithm: Which gave the result.
        found: The result.
        W: Weight (out, in) that was given.
        rank: That was asked for.
    """
    if not isinstance(found, Decomposition):
        raise RunError(f"{algorithm.name} returned a {type(found).__name__} and no Decomposition. {_FAULT}")
    shapes = {"S": tuple(W.shape), "U": (W.shape[0], rank), "V": (rank, W.shape[1])}
    for name, shape in shapes.items():
        part: object = getattr(found, name)
        if not isinstance(part, Tensor):
            raise RunError(f"{algorithm.name} returned a {type(part).__name__} and no tensor for {name}. {_FAULT}")
        if tuple(part.shape) != shape:
            raise RunError(f"{algorithm.name} returned {name} of shape {tuple(part.shape)}, not {shape}. {_FAULT}")
        if not part.is_floating_point() or part.device != W.device:
            raise RunError(
                f"{algorithm.name} returned {name} as {part.dtype} on {part.device}; floating point numbers on "
                f"{W.device} were asked for. {_FAULT}"
            )


@own_settings()
@torch.no_grad()
def decompose(
    W: Tensor | np.ndarray,
    H: Tensor | np.ndarray | Gram,
    *,
    pattern: Pattern | str | float,
    rank: int,
    algorithm: str = "3basil",
    damping: float = 0.005,
    relative_damping: float = 0.005,
    values: str = "model",
    levels: str = "auto",
    group: int | str = GROUP,
    factors: str = "auto",
    **options: object,
) -> Decomposition:
    """Split one matrix: W ≈ S + U V in the metric of its inputs.

    Args:
        W: Weight (out, in), any float type, of torch or numpy.
        H: (2 / windows) Σ x xᵀ of the layer's inputs (in, in), undamped, of torch or numpy; or a ``Gram``, which is
            damped already and remembers what was computed of it.
        pattern: A pattern, or ``"2:4"``; or the fraction removed, 0.5.
        rank: The rank of U V, 0 to min(out, in).
        algorithm: A name printed by ``sparlow algorithms``.
        damping: Absolute damping: this × mean(diag H) is added to the diagonal of H.
        relative_damping: Relative damping: this × diag(H) is added to the diagonal of H.
        values: Of S: ``int8``, ``int4``, ``int3``, ``int2`` for a grid of so many bits; ``model`` for W's type.
        levels: Of a grid: ``integer``, ``half``, ``book``; ``auto`` for the best of so many bits.
        group: Columns of a row that share a scale of a grid, or ``row``.
        factors: The type of U and V: ``int8``, ``model`` for W's, or ``auto``: int8 if the values are on a grid.
        options: Options of the algorithm.

    Returns:
        S (out, in), U (out, rank), V (rank, in) in W's type; ``stats.relative_error`` and more, see ``SolveStats``.

    Raises:
        InputError: The arguments do not fit together, or hold NaN or infinity.
        RunError: The result is not finite.
    """
    found, implied = find(algorithm)
    parsed = found.parse_options({**implied, **options})
    grid = make_grid(values, levels, group)
    if factors not in FACTORS:
        raise InputError(unknown(f"There are no factors of the type {factors!r}", factors, sorted(FACTORS)))
    int8 = factors == "int8" or (factors == "auto" and grid is not None)
    W = _as_tensor(W)
    gram = H if isinstance(H, Gram) else None
    if gram is None:
        gram = Gram.damped(_as_tensor(H).to(W.device), absolute=damping, relative=relative_damping)
    chosen = parse_pattern(str(pattern)) if isinstance(pattern, str | float) else pattern
    return solve(found, W, gram, chosen, rank, parsed, grid=grid, int8_factors=int8)


def _as_tensor(given: Any) -> Tensor:  # noqa: ANN401 - what a caller may have
    """Return a matrix of torch or numpy as a tensor, which shares its memory."""
    if isinstance(given, Tensor):
        return given
    if isinstance(given, np.ndarray) and given.dtype.kind == "f":
        return torch.from_numpy(np.ascontiguousarray(given))
    raise InputError(f"A matrix cannot be given as a {type(given).__name__}. Give floats, as a tensor or numpy array.")


def check(algorithm: Algorithm, W: Tensor, gram: Gram, pattern: Pattern, rank: int) -> None:
    """Raise InputError, in one sentence, if this layer cannot be solved as asked."""
    if W.ndim != 2 or not W.is_floating_point():  # noqa: PLR2004 - a matrix has two dimensions
        raise InputError(f"W must be a matrix (out, in) of floating point numbers. It is {W.dtype} {tuple(W.shape)}.")
    shape = (W.shape[0], W.shape[1])
    if gram.H.shape != (shape[1], shape[1]):
        raise InputError(f"H must be (in, in) = ({shape[1]}, {shape[1]}) for W {shape}, not {tuple(gram.H.shape)}.")
    check_budget(algorithm, shape, pattern, rank)
    if not all_finite(W):
        raise InputError(
            "The weight holds NaN or infinity: the model is damaged, or was stored in too narrow a type. Fetch it anew."
        )


def check_budget(algorithm: Algorithm, shape: tuple[int, int], pattern: Pattern, rank: int) -> None:
    """Raise InputError if pattern or rank are not possible for a weight of this shape (out, in)."""
    pattern.check(shape)
    if not 0 <= rank <= min(shape):
        raise InputError(f"Rank {rank} is not possible for a weight of shape {shape}. Give 0 to {min(shape)}.")
    if algorithm.kind == "pruner" and rank > 0:
        raise InputError(f"{algorithm.name} only prunes and has no low-rank part. Leave the rank out, or give rank 0.")
