"""S, and U V, while a compressed layer is trained: what of them are parameters, and how they come out as stored.

S is either kept entries in floats, or lies on a grid, of which the scales are trained: S_ij = s_{i, group of j} · level
of the code, and every code stays. U and V are floats, or int8. Whatever is stored in few bits is rounded in every
forward pass exactly as it will be stored, so that losses are those of the result; gradients pass the rounding as if it
were not there (straight through, Bengio et al., 2013, arXiv 1308.3432).
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sparlow.linalg.grid import FactorScales, GridValues
from sparlow.model.artefact.bitmask import positions_of

LARGEST_POWER = 30  # of two, by which columns of U are scaled
NARROWEST, WIDEST = 0.5, 2.0  # times a scale was, that it may become: it keeps its sign, and zeros stay zero
LARGEST_CODE = 127  # of a factor in int8
SHRUNK = 0.8  # times its first largest number: with less, the scale of a factor's row is fitted anew


class KeptValues(nn.Module):
    """S of which the kept entries are parameters, as one vector in float32; zeros stay zero.

    Where they are in S is found once. To look for them in every pass takes twenty times as long on a CPU, and makes an
    accelerator wait until it has counted them.
    """

    positions: Tensor

    def __init__(self, S: Tensor) -> None:
        super().__init__()
        found = positions_of(S != 0)
        kind = torch.int32 if S.numel() <= torch.iinfo(torch.int32).max else torch.int64
        self.register_buffer("positions", found.to(kind), persistent=False)  # (kept,) in S as one row
        self.values = nn.Parameter(S.flatten().index_select(0, found).float())
        self.shape = S.shape

    def forward(self) -> Tensor:
        """Return S (out, in)."""
        S: Tensor = _AtPositions.apply(self.values, self.positions, self.shape)  # type: ignore[no-untyped-call]
        return S

    def result(self, dtype: torch.dtype) -> Tensor:
        """Return S in its type; what rounds to zero takes the smallest number of its sign instead, to stay kept."""
        values = self.values.detach()
        rounded = values.to(dtype)
        return _spread(torch.where(rounded == 0, smallest(values, dtype), rounded), self.positions, self.shape)


class OnGrid(nn.Module):
    """S on its grid: codes stay, and what each scale is multiplied by is trained.

    Args:
        S: (out, in), on the grid.
        values: The grid.
        dtype: The type of the weight, to which decoded numbers are rounded.
    """

    level: Tensor
    scale: Tensor

    def __init__(self, S: Tensor, values: GridValues, dtype: torch.dtype) -> None:
        super().__init__()
        values = replace(values, scale=values.scale.to(S.device), levels=values.levels.to(S.device))
        kind = values.scale.dtype  # of 16 bits, in which every level is exact
        level = values.levels.to(kind)[values.encode(S).int()]
        self.register_buffer("level", level.masked_fill_(S == 0, 0) if values.masked else level, persistent=False)
        self.register_buffer("scale", values.scale, persistent=False)
        self.ratio = nn.Parameter(torch.ones(values.scale.shape, device=S.device))  # (out, groups)
        self._values, self._dtype = values, dtype

    @classmethod
    def of(cls, S: Tensor, values: GridValues, dtype: torch.dtype) -> "OnGrid | None":
        """Return S on its grid; None if it does not lie there."""
        found = cls(S, values, dtype)
        return found if torch.equal(found.result(S.dtype), S) else None

    def stored(self) -> GridValues:
        """Return the grid with the scales as they are now."""
        return replace(self._values, scale=self._scale().detach().to(self.scale.dtype))

    def _scale(self) -> Tensor:
        """Return the scales (out, groups), as they will be stored."""
        return rounded(self.scale.float() * self.ratio.clamp(NARROWEST, WIDEST), self.scale.dtype)

    def forward(self) -> Tensor:
        """Return S (out, in)."""
        steps = replace(self._values, scale=self._scale()).steps(self.level.shape[1])
        return rounded(self.level.float() * steps, self._dtype)

    def result(self, dtype: torch.dtype) -> Tensor:
        """Return S in its type."""
        S: Tensor = self()
        return S.detach().to(dtype) + 0.0  # no negative zero


class LowRank(nn.Module):
    """U V in floats.

    Columns of U come out of some methods hundreds of times as long as rows of V, and a step of Adam, which has one size
    for all, then breaks the layer. So they are brought to a length of about 1, by powers of two, which round nothing.
    """

    lengths: Tensor

    def __init__(self, U: Tensor, V: Tensor) -> None:
        super().__init__()
        U, V = U.float(), V.float()
        self.register_buffer("lengths", _powers(torch.linalg.vector_norm(U, dim=0)), persistent=False)  # (r,)
        self.U, self.V = nn.Parameter(U / self.lengths), nn.Parameter(V * self.lengths[:, None])

    def forward(self) -> Tensor:
        """Return U V (out, in)."""
        return self.U @ self.V

    def result(self) -> tuple[Tensor, Tensor]:
        """Return U and V."""
        return self.U.detach() * self.lengths, self.V.detach() / self.lengths[:, None]


class Int8LowRank(LowRank):
    """U V in int8, U by columns and V by rows: rounded in every pass, while the parameters stay floats.

    A scale stays as it is while the largest number of its row fits it; else rounding would be another in every step,
    and in the first already.

    Args:
        U: (out, r), on the grid of its scales.
        V: (r, in), likewise.
        scales: Of both.
        dtype: The type of the weight, to which decoded numbers are rounded.
    """

    of_columns: Tensor
    of_rows: Tensor

    def __init__(self, U: Tensor, V: Tensor, scales: FactorScales, dtype: torch.dtype) -> None:
        super().__init__(U, V)
        self._kind, self._dtype = scales.U.dtype, dtype
        self.register_buffer("of_columns", scales.U.to(U.device).float(), persistent=False)
        self.register_buffer("of_rows", scales.V.to(U.device).float(), persistent=False)
        self._first = [X.detach().abs().amax(dim) for X, dim in zip(self._true(), (0, 1), strict=True)]

    def forward(self) -> Tensor:
        """Return U V (out, in)."""
        (U, V), _ = self._rounded()
        return (U / self.lengths) @ (V * self.lengths[:, None])

    def result(self) -> tuple[Tensor, Tensor]:
        """Return U and V."""
        (U, V), _ = self._rounded()
        return U.detach() + 0.0, V.detach() + 0.0

    def stored(self) -> FactorScales:
        """Return the scales as they are now."""
        _, scales = self._rounded()
        return FactorScales(*(scale.to(self._kind) for scale in scales))

    def _true(self) -> tuple[Tensor, Tensor]:
        """Return U and V of their own lengths."""
        return self.U * self.lengths, self.V / self.lengths[:, None]

    def _rounded(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return U and V as they will be read, and their scales."""
        found, scales = [], []
        for X, old, first, dim in zip(self._true(), (self.of_columns, self.of_rows), self._first, (0, 1), strict=True):
            largest = X.detach().abs().amax(dim)
            fits = (largest >= SHRUNK * first) & (largest <= (LARGEST_CODE + 0.5) * old)
            scale = torch.where(fits, old, (largest / LARGEST_CODE).to(self._kind).float())
            step = scale.unsqueeze(dim)
            codes = (X.detach() / torch.where(step == 0, 1.0, step)).round_().clamp_(-LARGEST_CODE, LARGEST_CODE)
            found.append(_Through.apply(X, (codes * step).to(self._dtype).float()))  # type: ignore[no-untyped-call]
            scales.append(scale)
        return found, scales


PARTS = (KeptValues, OnGrid, LowRank)


def _spread(values: Tensor, positions: Tensor, shape: torch.Size) -> Tensor:
    """Return zeros (out, in) with ``values`` at their positions."""
    return values.new_zeros(shape.numel()).scatter_(0, positions.long(), values).view(shape)


class _AtPositions(torch.autograd.Function):
    """``_spread``, which keeps no more than the positions for the gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, positions: Tensor, shape: torch.Size) -> Tensor:  # noqa: ANN401 - torch's
        ctx.save_for_backward(positions)
        return _spread(values, positions, shape)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401 - torch's
        (positions,) = ctx.saved_tensors
        return outer[0].flatten().index_select(0, positions), None, None


class _Through(torch.autograd.Function):
    """A number in the place of another, whose gradient goes to that one as it is."""

    @staticmethod
    def forward(_ctx: Any, _of: Tensor, value: Tensor) -> Tensor:  # noqa: ANN401 - torch's
        return value

    @staticmethod
    def backward(_ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401 - torch's
        return outer[0], None


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x rounded to a type, in its own; gradients pass."""
    if x.dtype == dtype:
        return x
    found: Tensor = _Through.apply(x, x.detach().to(dtype).to(x.dtype))  # type: ignore[no-untyped-call]
    return found


def smallest(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the smallest number of ``dtype`` with the sign of each value.

    In float16 that is a subnormal one, 2⁻²⁴: its smallest normal number, 6e-5, is a weight like others. In types with
    the range of float32 it is a normal number, 1e-38: some devices take smaller ones for zero.
    """
    least = max(torch.finfo(dtype).tiny * torch.finfo(dtype).eps, torch.finfo(torch.float32).tiny)
    return torch.full_like(values, least).copysign(values).to(dtype)


def _powers(lengths: Tensor) -> Tensor:
    """The powers of two that are nearest; 1 where a length is 0."""
    powers = lengths.log2().round().clamp(-LARGEST_POWER, LARGEST_POWER)
    return torch.where(lengths > 0, powers, 0).exp2()
