"""Second moments of a layer's inputs, H = (2 / windows) Σ x xᵀ, and the factorisations that solvers share."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from sparlow.errors import InputError
from sparlow.finite import all_finite
from sparlow.linalg.coordinates import Coordinates, cholesky, deal
from sparlow.linalg.token_sample import TokenSample, error_per_token

OTHERS = 0.03  # damping of the other inputs, in units of the diagonal, when each input is explained by them
PANELS = 4  # of a sum of products: five eighths of the work, see docs/performance.md
RIDGES_KEPT = 2**28  # bytes of ridge inverses that a Gram remembers


def summing(device: torch.device) -> torch.dtype:
    """The type in which statistics are added up: float64 wherever the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


class GramAccumulator:
    """Stream activations into Σ x xᵀ without ever holding them together.

    The products of a micro-batch are taken in float32 (float64 if that is what it comes in) and added up in float64: so
    H, rounded to float32 in the end, is the same whatever the order, and however many processes each had a part.

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
        """Columns of the sum, which is symmetric: of each panel the part below its own rows is not computed."""
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
    """Stream activations into Σ x², the diagonal of what ``GramAccumulator`` sums; the same constructor.

    Args:
        features: Width of the layer's input.
        device: Where the sum (features,) lives.
    """

    def __init__(self, features: int, device: torch.device) -> None:
        self.sum = torch.zeros(features, device=device, dtype=summing(device))

    def add(self, x: Tensor) -> None:
        """Add the inputs ``x`` (..., features)."""
        self.sum += x.reshape(-1, x.shape[-1]).to(self.sum.device, torch.float32).square().sum(0)


@dataclass(frozen=True)
class Gram:
    """A damped, positive definite H (in, in). What depends on H alone is computed once, on first use.

    Build it with ``Gram.damped``. Layers that read the same input share one.
    """

    H: Tensor  # (in, in)
    dead: Tensor  # (in,) bool: inputs that were always zero
    remember: int = RIDGES_KEPT  # bytes of ridge inverses, at most
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

        A dead column (H_jj = 0) gets H_jj = 1. Raises InputError if H (in, in) is not square, finite and of
        non-negative diagonal, or a damping is negative. Of the inverses of ``Coordinates.ridge``, ``remember`` bytes
        are kept.

        ``sample`` (tokens, in) is of the tokens that H was added up from, each of length one.
        """
        if H.ndim != 2 or H.shape[0] != H.shape[1]:  # noqa: PLR2004 - a matrix has two dimensions
            raise InputError(f"H must be a square matrix (in, in), not of shape {tuple(H.shape)}.")
        if not (absolute >= 0 and relative >= 0):
            raise InputError("Damping must not be negative.")
        H = H.float()
        diagonal = H.diagonal()
        if not all_finite(H) or (diagonal < 0).any():
            raise InputError("H holds NaN, infinity or a negative diagonal: check the calibration activations.")
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
        """E (in,) with E_jj² ∝ H_jj / [(H̃ + 0.03 I)⁻¹]_jj: what of each input the others do not explain.

        That is what an entry costs once the others of its row have made up for it (the saliency of Optimal Brain
        Surgeon, Hassibi and Stork, 1992, for a damped H̃). Scaled so that E⁻¹ H E⁻¹ has a diagonal of mean 1.
        """
        shifted = self._scaled_by(self.scale)
        shifted.diagonal().add_(OTHERS)
        inverse = torch.cholesky_inverse(self._factorised(shifted, "H̃ + 0.03 I")).diagonal()
        return self.scale * (inverse.mean() / inverse).sqrt()

    @cached_property
    def correlation(self) -> Tensor:
        """H̃ = E⁻¹ H E⁻¹ (in, in), E = diag(H)^½: of unit diagonal, whatever the units of the inputs."""
        return self._scaled_by(self.scale)

    def _scaled_by(self, scale: Tensor) -> Tensor:
        """E⁻¹ H E⁻¹ (in, in), new, for E of this diagonal (in,)."""
        return (self.H / scale).div_(scale[:, None])

    @cached_property
    def cholesky(self) -> Tensor:
        """R (in, in), lower, with R Rᵀ = H̃; damped further if it could not be factorised, see ``extra_damping``."""
        return self._factorised(self.correlation, "the correlation of the inputs")

    @cached_property
    def inverse_cholesky(self) -> Tensor:
        """A (in, in), upper, with Aᵀ A = H̃⁻¹; damped further if need be, see ``extra_damping``.

        H̃ read from its last row and column to its first has the factor B; read back, B is the upper triangular root of
        H̃, and A its inverse. H̃⁻¹ itself, whose rounding could break a factorisation, is never formed.
        """
        B = self._factorised(self.correlation.flip(0, 1), "the correlation of the inputs, read backwards")
        eye = torch.eye(B.shape[0], device=B.device, dtype=B.dtype)
        A: Tensor = torch.linalg.solve_triangular(B.flip(0, 1), eye, upper=True)
        return A

    @property
    def extra_damping(self) -> float:
        """The most damping (in units of the diagonal) that a factorisation had to add so far; 0 if none had to."""
        return max(self._added, default=0.0)

    @property
    def remembered(self) -> int:
        """Bytes of the ridge inverses it holds."""
        return sum(coordinates.remembered for coordinates in self._coordinates.values())

    def _factorised(self, A: Tensor, what: str) -> Tensor:
        factor, damping = cholesky(A, what)
        if damping:
            self._added.append(damping)
        return factor

    def coordinates(self, *, conditional: bool = False, group: int | None = None) -> Coordinates:
        """Return where a solver works: scaled by ``scale`` or ``conditional_scale``, columns dealt for ``group``.

        What was asked for last is kept for the layers that share this Gram, and nothing else: it is large.

        Args:
            conditional: Scale each input by what the others leave of it unexplained, not by its norm.
            group: Consecutive columns that a pattern chooses among; None if it chooses among all.
        """
        group = group or 1
        key = (conditional, group)
        if key not in self._coordinates:
            self._coordinates.clear()
            if conditional or group > 1:
                scale = self.conditional_scale if conditional else self.scale
                G = deal(deal(self._scaled_by(scale), group).T, group)
            else:
                scale, G = self.scale, self.correlation
            self._coordinates[key] = Coordinates(scale, G, group, self.remember, self._added)
        return self._coordinates[key]

    def objective(self, residual: Tensor) -> Tensor:
        """Return tr(R H Rᵀ) of a ``residual`` R (out, in), a scalar tensor: the layer-wise reconstruction error."""
        return ((residual @ self.H) * residual).sum()

    def relative_error(self, W: Tensor, residual: Tensor) -> float:
        """f(residual) / f(W), both (out, in); 0 where the layer's output was zero to begin with."""
        whole = self.objective(W).item()
        return self.objective(residual).item() / whole if whole > 0 else 0.0

    def relative_error_per_token(self, W: Tensor, residual: Tensor) -> float | None:
        """The same over the sampled tokens, each at length one; None where there are none."""
        if self.sample is None or not len(self.sample):
            return None
        return error_per_token(self.sample, W, residual)
