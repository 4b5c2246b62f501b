"""Second moments of a layer's inputs, H = (2 / windows) Σ x xᵀ, and the factorisations that solvers share."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from sparlow.errors import InputError
from sparlow.finite import all_finite
from sparlow.linalg.coordinates import Coordinates, cholesky, interleave
from sparlow.linalg.shared_rows import summed
from sparlow.linalg.tf32 import unit
from sparlow.linalg.token_sample import TokenSample, error_per_token

OTHERS = 0.03  # damping, in units of the diagonal, when each input is predicted from the others
PANELS = 4  # of a sum of products: five eighths of the work, see docs/memory.md
ORDINARY = 2.0**24  # an H whose largest diagonal entry lies within this factor of 1 is not rescaled
RIDGES_KEPT = 2**28  # bytes of ridge inverses that a Gram caches


def summing(device: torch.device) -> torch.dtype:
    """The type in which statistics are added up: float64 wherever the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


class GramAccumulator:
    """Accumulate Σ x xᵀ over micro-batches of activations, which are not kept.

    The products of a micro-batch are computed in float32 (in float64 if the activations are) and summed in float64. So
    H, rounded to float32 at the end, depends neither on the order nor on how many processes share the text.

    Args:
        features: Width of the layer's input.
        device: Where the sum (features, features) lives.
    """

    def __init__(self, features: int, device: torch.device) -> None:
        self.sum = torch.zeros(features, features, device=device, dtype=summing(device))
        self.tokens = 0
        self.sample = TokenSample(features, device)

    def add(self, x: Tensor) -> None:
        """Add the inputs ``x`` (..., features)."""
        x = x.reshape(-1, x.shape[-1]).to(self.sum.device, torch.promote_types(x.dtype, torch.float32))
        for start, end in self._panels():
            self.sum[:end, start:end].add_(x[:, :end].T @ x[:, start:end])
        self.tokens += x.shape[0]
        self.sample.add(x)

    def second_moment(self, windows: int) -> Tensor:
        """Return H = (2 / windows) Σ x xᵀ (features, features), undamped, in float32."""
        H = self.sum.float().mul_(2 / windows)
        for start, end in self._panels():
            H[start:end, :start] = H[:start, start:end].T
        return H

    def _panels(self) -> Iterator[tuple[int, int]]:
        """Yield panels of columns. The sum is symmetric, so the part of a panel below its own rows is not computed."""
        features = len(self.sum)
        width = -(-features // PANELS)
        return ((start, min(start + width, features)) for start in range(0, features, width))


class EvenGramAccumulator(GramAccumulator):
    """Σ x xᵀ / |x|²: every token counts alike, however large it is; the same constructor."""

    def add(self, x: Tensor) -> None:
        """Add the inputs ``x`` (..., features)."""
        x = x.to(self.sum.device, torch.promote_types(x.dtype, torch.float32))
        super().add(torch.nan_to_num(x / x.norm(dim=-1, keepdim=True)))  # a token of zeros stays one


class SquareAccumulator:
    """Accumulate Σ x², the diagonal of what ``GramAccumulator`` sums. It has the same constructor.

    Args:
        features: Width of the layer's input.
        device: Where the sum (features,) lives.
    """

    def __init__(self, features: int, device: torch.device) -> None:
        self.sum = torch.zeros(features, device=device, dtype=summing(device))

    def add(self, x: Tensor) -> None:
        """Add the inputs ``x`` (..., features)."""
        self.sum += x.reshape(-1, x.shape[-1]).to(self.sum.device, torch.float32).square().sum(0)


def _in_range(H: Tensor) -> Tensor:
    """Return H (in, in) in float32, divided by a power of four if its diagonal is far from 1."""
    H = H if H.dtype == torch.float64 else H.float()
    size = unit(H.diagonal())
    if not 1 / ORDINARY <= size <= ORDINARY:
        H = H / 4.0 ** math.floor(math.log2(size) / 2)
    return H.float()


@dataclass(frozen=True)
class Gram:
    """A damped, positive definite H (in, in). What depends on H alone is computed once, on first use.

    Build it with ``Gram.damped``. Layers that read the same input share one.
    """

    H: Tensor  # (in, in); ``damped`` may have divided it by a power of four, which changes no result
    dead: Tensor  # (in,) bool: inputs that were always zero
    remember: int = RIDGES_KEPT  # at most so many bytes of ridge inverses are cached
    sample: Tensor | None = None  # (tokens, in) of length one: some of what H was added up from
    _added: list[float] = field(default_factory=list, repr=False, compare=False)  # damping that factorisations needed
    _coordinates: dict[tuple[bool, int], Coordinates] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def damped(
        cls,
        H: Tensor,
        *,
        absolute: float = 0.005,
        relative: float = 0.005,
        remember: int = RIDGES_KEPT,
        sample: Tensor | None = None,
    ) -> "Gram":
        """Return the Gram of ``H + absolute·mean(diag H)·I + relative·diag(H)``.

        A dead input (H_jj = 0) gets H_jj = 1. Raises InputError unless H (in, in) is square and finite, its diagonal is
        not negative, and neither damping is negative. At most ``remember`` bytes of the inverses of
        ``Coordinates.ridge`` are cached.

        Multiplying H by a constant changes no result. So an H whose largest diagonal entry is beyond ``ORDINARY`` is
        divided by a power of four, before sums over it or over its squares overflow or underflow in float32. That
        divides E by a power of two, so no bit is lost.

        ``sample`` (tokens, in) is of the tokens that H was added up from, each of length one.
        """
        if H.ndim != 2 or H.shape[0] != H.shape[1]:  # noqa: PLR2004 - a matrix has two dimensions
            raise InputError(f"H must be a square matrix (in, in), not of shape {tuple(H.shape)}.")
        if not (absolute >= 0 and relative >= 0):
            raise InputError("Damping must not be negative. Give 0 or more.")
        H = _in_range(H)
        diagonal = H.diagonal()
        if not all_finite(H) or (diagonal < 0).any():
            raise InputError("H holds NaN, infinity or a negative diagonal. Check the calibration activations.")
        dead = diagonal == 0
        added = absolute * diagonal.mean() + relative * diagonal
        H = H.clone()
        H.diagonal().add_(torch.where(dead, 1.0, added))
        return cls(H, dead, remember, sample)

    @classmethod
    def identity(cls, features: int, device: torch.device | None = None) -> "Gram":
        """Return H = I: the plain Frobenius norm, for a layer that saw no data."""
        return cls.damped(torch.eye(features, device=device), absolute=0, relative=0)

    @cached_property
    def scale(self) -> Tensor:
        """diag(H)^½ (in,): the norm of each input feature."""
        return self.H.diagonal().sqrt()

    @cached_property
    def conditional_scale(self) -> Tensor:
        """E (in,) with E_jj² ∝ H_jj / [(H̃ + 0.03 I)⁻¹]_jj: the variance of each input that the others do not explain.

        Removing an entry costs its square times this, after the rest of its row was adjusted to compensate (the
        saliency of Optimal Brain Surgeon, Hassibi and Stork, 1992, for a damped H̃). E is scaled so that the diagonal of
        E⁻¹ H E⁻¹ has the mean 1.
        """
        shifted = self._scaled_by(self.scale)
        shifted.diagonal().add_(OTHERS)
        inverse = torch.cholesky_inverse(self._factorised(shifted, "H̃ + 0.03 I")).diagonal()
        return self.scale * (inverse.mean() / inverse).sqrt()

    @cached_property
    def correlation(self) -> Tensor:
        """H̃ = E⁻¹ H E⁻¹ (in, in), E = diag(H)^½: its diagonal is 1, whatever the units of the inputs."""
        return self._scaled_by(self.scale)

    def _scaled_by(self, scale: Tensor) -> Tensor:
        """Return a new tensor E⁻¹ H E⁻¹ (in, in), where ``scale`` (in,) is the diagonal of E."""
        return (self.H / scale).div_(scale[:, None])

    @cached_property
    def cholesky(self) -> Tensor:
        """R (in, in), lower, with R Rᵀ = H̃; damped further if it could not be factorised, see ``extra_damping``."""
        return self._factorised(self.correlation, "the correlation of the inputs")

    @cached_property
    def inverse_cholesky(self) -> Tensor:
        """A (in, in), upper, with Aᵀ A = H̃⁻¹; damped further if need be, see ``extra_damping``.

        With rows and columns of H̃ reversed, its Cholesky factor is B. Reversed again, B is an upper triangular root of
        H̃, and A is the inverse of that. H̃⁻¹ itself is never formed, since its rounding could break a factorisation.
        """
        B = self._factorised(self.correlation.flip(0, 1), "the correlation of the inputs, read backwards")
        eye = torch.eye(B.shape[0], device=B.device, dtype=B.dtype)
        A: Tensor = torch.linalg.solve_triangular(B.flip(0, 1), eye, upper=True)
        return A

    @property
    def extra_damping(self) -> float:
        """The largest damping, in units of the diagonal, that a factorisation had to add so far; 0 if none had to."""
        return max(self._added, default=0.0)

    @property
    def remembered(self) -> int:
        """Bytes of the cached ridge inverses."""
        return sum(coordinates.remembered for coordinates in self._coordinates.values())

    def _factorised(self, A: Tensor, what: str) -> Tensor:
        factor, damping = cholesky(A, what)
        if damping:
            self._added.append(damping)
        return factor

    def coordinates(self, *, conditional: bool = False, group: int | None = None) -> Coordinates:
        """Return the coordinates of a solver: scaled by ``scale`` or ``conditional_scale``, interleaved for ``group``.

        Only the last result is cached, for the layers that share this Gram, because it is large.

        Args:
            conditional: Scale each input by ``conditional_scale`` instead of by its norm.
            group: Number of consecutive columns among which a pattern chooses; None if it chooses among all.
        """
        group = group or 1
        key = (conditional, group)
        if key not in self._coordinates:
            self._coordinates.clear()
            if conditional or group > 1:
                scale = self.conditional_scale if conditional else self.scale
                G = interleave(interleave(self._scaled_by(scale), group).T, group)
            else:
                scale, G = self.scale, self.correlation
            self._coordinates[key] = Coordinates(scale, G, group, self.remember, self._added)
        return self._coordinates[key]

    def objective(self, residual: Tensor) -> Tensor:
        """Return the layer-wise reconstruction error tr(R H Rᵀ) of a ``residual`` R (out, in), a scalar tensor."""
        return ((residual @ self.H) * residual).sum()

    def relative_error(self, W: Tensor, residual: Tensor) -> float:
        """Return tr(R H Rᵀ) / tr(W H Wᵀ) for a ``residual`` R (out, in); 0 if the layer's output is always zero.

        Of a residual that is nearly zero the sum of what rounding left may come out below zero, by some 1e-9 of the
        whole. An error is never negative, so that is 0.
        """
        whole, left = (summed(self.objective(part).item()) for part in (W, residual))
        return max(left / whole, 0.0) if whole > 0 else 0.0

    def relative_error_per_token(self, W: Tensor, residual: Tensor) -> float | None:
        """Return the same over the sampled tokens, each at length one; None where there are none."""
        sample = W.new_zeros(0, W.shape[1]) if self.sample is None else self.sample
        if not summed(len(sample)):
            return None
        return error_per_token(sample, W, residual)
