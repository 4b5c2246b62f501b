"""The thin shell around every algorithm: what is checked before and after, the same for all."""

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparlow.algorithms._registry import Algorithm, Decomposition, find
from sparlow.errors import InputError, RunError
from sparlow.finite import all_finite
from sparlow.linalg.gram import Gram
from sparlow.linalg.patterns import Pattern, parse_pattern

# Part of every run's fingerprint in the place of the package's version: a run that was begun with another number is
# refused. Raise it whenever the same recipe, model and text may give other bits than before: a change of any algorithm
# or of its default options, of the statistics, of allocation, matching or fine-tuning. Leave it for everything else.
REVISION = 1


@torch.no_grad()
def solve(
    algorithm: Algorithm, W: Tensor, gram: Gram, pattern: Pattern, rank: int, options: Mapping[str, Any]
) -> Decomposition:
    """Run one algorithm on one weight.

    Args:
        algorithm: From ``find``; a pruner takes rank 0 only.
        W: Weight (out, in), any float type; solved in float32.
        gram: Of the layer's inputs (in, in), on W's device.
        pattern: Which entries of S may survive.
        rank: Rank of the low-rank part, 0 to min(out, in).
        options: The algorithm's own, parsed.

    Returns:
        S, U, V in W's type and device; ``stats`` holds at least ``relative_error`` (of exactly these S, U, V),
        ``iterations``, ``seconds``, ``damping`` (extra, 0 unless a factorisation needed it) and ``dead_columns``.

    Raises:
        InputError: W and the rest do not fit together, or W is not finite.
        RunError: The result is not finite.
    """
    check(algorithm, W, gram, pattern, rank)
    start = time.perf_counter()
    weight = W.float().contiguous() * ~gram.dead  # an input that is always zero needs no weight
    try:
        if algorithm.kind == "pruner":
            kept = algorithm.function(weight, gram, pattern, **options)
            found = Decomposition(kept, weight.new_zeros(W.shape[0], 0), weight.new_zeros(0, W.shape[1]))
        else:
            found = algorithm.function(weight, gram, pattern, rank, **options)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # it is there, and documented
        raise RunError(f"{algorithm.name} failed in a factorisation: raise the damping ({error}).") from error
    S, U, V = (part.to(W.dtype).contiguous() + 0.0 for part in (found.S, found.U, found.V))  # + 0.0: no negative zero
    relative_error = gram.relative_error(weight, weight - S.float() - U.float() @ V.float())
    if not all(all_finite(part) for part in (S, U, V)) or not math.isfinite(relative_error):
        raise RunError(f"{algorithm.name} ended in values that are not finite: raise the damping.")
    shell = {
        "relative_error": relative_error,
        "seconds": time.perf_counter() - start,
        "damping": gram.extra_damping,
        "dead_columns": int(gram.dead.sum()),
    }
    return Decomposition(S, U, V, {"iterations": 1, **found.stats, **shell})


def decompose(
    W: Tensor,
    H: Tensor,
    *,
    pattern: Pattern | str,
    rank: int,
    algorithm: str = "3basil",
    damping: float = 0.005,
    relative_damping: float = 0.005,
    **options: object,
) -> Decomposition:
    """Split one matrix: W ≈ S + U V in the metric of its inputs.

    Args:
        W: Weight (out, in), any float type.
        H: (2 / windows) Σ x xᵀ of the layer's inputs (in, in), undamped.
        pattern: A pattern, or ``"2:4"``, ``"0.5"``.
        rank: Of U V, 0 to min(out, in).
        algorithm: A name printed by ``sparlow algorithms``.
        damping: Times mean(diag H), added to the diagonal of H.
        relative_damping: Times diag(H), added likewise.
        options: The algorithm's own.

    Returns:
        S (out, in), U (out, rank), V (rank, in) in W's type; ``stats["relative_error"]`` and more, see ``solve``.

    Raises:
        InputError: The arguments do not fit together, or hold NaN or infinity.
        RunError: The result is not finite.
    """
    found, implied = find(algorithm)
    parsed = found.parse_options({**implied, **options})
    gram = Gram.damped(H.to(W.device), absolute=damping, relative=relative_damping)
    return solve(found, W, gram, parse_pattern(pattern) if isinstance(pattern, str) else pattern, rank, parsed)


def check(algorithm: Algorithm, W: Tensor, gram: Gram, pattern: Pattern, rank: int) -> None:
    """Raise InputError, in one sentence, if this layer cannot be solved as asked."""
    if W.ndim != 2 or not W.is_floating_point():  # noqa: PLR2004 - a matrix has two dimensions
        raise InputError(f"W must be a matrix (out, in) of floating point numbers, not {W.dtype} {tuple(W.shape)}.")
    shape = (W.shape[0], W.shape[1])
    if gram.H.shape != (shape[1], shape[1]):
        raise InputError(f"H must be (in, in) = ({shape[1]}, {shape[1]}) for W {shape}, not {tuple(gram.H.shape)}.")
    check_budget(algorithm, shape, pattern, rank)
    if not all_finite(W):
        raise InputError("The weight holds NaN or infinity: the model is damaged, or was stored in too narrow a type.")


def check_budget(algorithm: Algorithm, shape: tuple[int, int], pattern: Pattern, rank: int) -> None:
    """Raise InputError if pattern or rank are not possible for a weight of this shape (out, in)."""
    pattern.check(shape)
    if not 0 <= rank <= min(shape):
        raise InputError(f"Rank {rank} is not possible for a weight of shape {shape}: give 0 to {min(shape)}.")
    if algorithm.kind == "pruner" and rank > 0:
        raise InputError(f"{algorithm.name} only prunes and has no low-rank part: leave the rank out, or give rank 0.")
