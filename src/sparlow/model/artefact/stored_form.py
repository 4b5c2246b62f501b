"""A compressed weight ⇄ the tensors it is stored as, in floats or as codes of few bits.

In memory S, U and V are ordinary float tensors. Beside them a ``StoredForm`` says on which grid they lie, and the codes
are found again when the layer is packed. What does not lie on its grid any more, because it was trained, is packed in
the type that it has: nothing is rounded on the way to a file.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from sparlow.errors import InputError
from sparlow.finite import all_finite
from sparlow.linalg.grid import FactorScales, Grid, GridValues
from sparlow.model.artefact.bitmask import (
    bits_of_bytes,
    bytes_of_bits,
    check_mask,
    pack,
    positions_of,
    rows_at_a_time,
    unpack,
)
from sparlow.model.artefact.codes import pack_codes, row_bytes, unpack_codes

SCALE_TYPES = (torch.bfloat16, torch.float16)
_LARGEST = 127  # of a factor's code


@dataclass(frozen=True, slots=True, eq=False)
class StoredForm:
    """How a weight that is in memory in floats is to be packed; its tensors are on the CPU.

    Attributes:
        values: The grid that S lies on; None for values in their own type.
        factors: The scales of U and V in int8; None for factors in their own type.
        dtype: The type to which decoded numbers are rounded, that of the weight in the model as stored; None if nobody
            has said, and then it is seen from the numbers.
    """

    values: GridValues | None = None
    factors: FactorScales | None = None
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        def here(t: Tensor) -> Tensor:
            return t.detach().cpu().contiguous()

        values, factors = self.values, self.factors
        if values is not None:
            values = replace(values, scale=here(values.scale), levels=here(values.levels))
        if factors is not None:
            factors = FactorScales(here(factors.U), here(factors.V))
        scales = ([] if values is None else [values.scale]) + ([] if factors is None else [factors.U, factors.V])
        for scale in scales:
            if scale.dtype not in SCALE_TYPES:
                raise InputError(f"Scales are stored in bfloat16 or float16, not in {scale.dtype}. Round them first.")
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "factors", factors)

    @property
    def grid(self) -> Grid | None:
        """The grid of the values."""
        return None if self.values is None else self.values.grid


class Weight(NamedTuple):
    """S (out, in), U (out, rank) and V (rank, in) of a weight, in floats."""

    S: Tensor
    U: Tensor
    V: Tensor


@dataclass(frozen=True)
class PackedWeight:
    """A weight as it is stored.

    Attributes:
        tensors: By the last part of their names; those in floats have the type they have in memory.
        kept: Number of values that the file holds.
        grid: That of the values; None for floats.
        dtype: To which decoded numbers are rounded.
        int8_factors: Whether U and V are in int8.
        lost: What of ``values`` and ``factors`` does not lie on its grid any more.
    """

    tensors: dict[str, Tensor]
    kept: int
    grid: Grid | None
    dtype: torch.dtype
    int8_factors: bool
    lost: tuple[str, ...]


@torch.no_grad()
def pack_weight(weight: Weight, form: StoredForm | None, wanted: torch.dtype | None = None) -> PackedWeight:
    """Return a weight as it is stored, on its own device.

    Args:
        weight: It.
        form: How it is to be packed, as far as its numbers still allow it; None for floats.
        wanted: The type that it is stored in, if that is known and not its own.
    """
    S, U, V = (part.detach() for part in weight)
    values, factors = (None, None) if form is None else (form.values, form.factors if len(V) else None)
    types = _types(form, wanted, S.dtype)
    codes = None if values is None else _codes(S, _exact(values, S.device), types)
    whole = None if factors is None else _factor_codes(U, V, factors, codes[1] if codes else types)
    lost = [
        name for name, asked, found in (("values", values, codes), ("factors", factors, whole)) if asked and not found
    ]
    agreed = whole[1] if whole else codes[1] if codes else [S.dtype]
    if values is not None and codes is not None:
        tensors, kept = _pack_codes(S, values, codes[0])
    else:
        kept_values, mask = pack(S)
        kept = len(kept_values)
        tensors = {"weight": kept_values} | ({"mask": mask} if kept < S.numel() else {})
    if codes and not len(V):
        U, V = U.to(agreed[0]), V.to(agreed[0])  # of no number: as if they had been decoded
    tensors |= {"U": U, "V": V} if whole is None else whole[0]
    return PackedWeight(tensors, kept, values.grid if values and codes else None, agreed[0], bool(whole), tuple(lost))


def _types(form: StoredForm | None, wanted: torch.dtype | None, own: torch.dtype) -> list[torch.dtype]:
    """Return the types to which decoded numbers may have been rounded, the likeliest first."""
    scales: list[Tensor] = [form.values.scale] if form and form.values else []
    scales += [form.factors.U] if form and form.factors else []
    found = [form.dtype if form else None, wanted, own, *(scale.dtype for scale in scales)]
    return list(dict.fromkeys(dtype for dtype in found if dtype is not None))


def _exact(values: GridValues, device: torch.device) -> GridValues:
    """Return a grid on a device; levels that are not learned exactly as the format defines them."""
    levels = values.levels if values.grid.levels == "book" else values.grid.uniform()
    return replace(values, scale=values.scale.to(device), levels=levels.to(device))


def _by_rows(values: GridValues, columns: int) -> Iterator[tuple[slice, GridValues]]:
    size = rows_at_a_time(columns)
    for start in range(0, len(values.scale), size):
        some = slice(start, start + size)
        yield some, replace(values, scale=values.scale[some])


def _codes(S: Tensor, values: GridValues, types: Sequence[torch.dtype]) -> tuple[Tensor, list[torch.dtype]] | None:
    """Return the code (out, in) of each entry, and the types S may have been rounded to; None if it is off grid."""
    if values.scale.shape != (len(S), values.grid.groups(S.shape[1])) or len(values.levels) != 1 << values.grid.bits:
        return None
    found, left = torch.empty(S.shape, dtype=torch.uint8, device=S.device), list(types)
    for some, rows in _by_rows(values, S.shape[1]):
        codes = found[some] = rows.encode(S[some])
        decoded = rows.decode(codes)
        if values.masked:
            decoded = decoded.masked_fill(S[some] == 0, 0)
        left = [dtype for dtype in left if torch.equal(decoded.to(dtype).to(S.dtype), S[some])]
        if not left:
            return None
    return found, left


def _factor_codes(
    U: Tensor, V: Tensor, scales: FactorScales, types: Sequence[torch.dtype]
) -> tuple[dict[str, Tensor], list[torch.dtype]] | None:
    """Return U and V in int8, their scales, and the types they may have been rounded to; None if they are off grid."""
    if scales.U.shape != (len(V),) or scales.V.shape != (len(V),):
        return None
    steps = {"U": scales.U.to(U.device).float()[None], "V": scales.V.to(U.device).float()[:, None]}
    tensors, left = {"U_scale": scales.U, "V_scale": scales.V}, list(types)
    for name, factor in (("U", U), ("V", V)):
        step = steps[name]
        codes = (factor.float() / torch.where(step == 0, 1.0, step)).round().clamp(-_LARGEST, _LARGEST).nan_to_num()
        left = [dtype for dtype in left if torch.equal((codes * step).to(dtype).to(factor.dtype), factor)]
        tensors[name] = codes.to(torch.int8)
    return (tensors, left) if left else None


def _pack_codes(S: Tensor, values: GridValues, codes: Tensor) -> tuple[dict[str, Tensor], int]:
    """Return the tensors of values on a grid, and how many values these are."""
    parts = {"scale": values.scale} | ({"book": values.levels} if values.grid.levels == "book" else {})
    if not values.masked or bool((S != 0).all()):
        counts = torch.full((len(S),), S.shape[1], device=S.device)
        return {"weight": pack_codes(codes.view(-1), counts, values.grid.bits), **parts}, S.numel()
    keep = S != 0
    kept = codes.view(-1).index_select(0, positions_of(keep))
    packed = pack_codes(kept, keep.sum(1), values.grid.bits)
    return {"weight": packed, "mask": bytes_of_bits(keep), **parts}, len(kept)


PARTS = ("weight", "mask", "scale", "book", "U", "V", "U_scale", "V_scale")  # last parts of the names of tensors


def is_flat(weight: object) -> bool:
    """Whether what a state dict has as a weight is one that was packed."""
    return isinstance(weight, Tensor) and weight.ndim == 1


def take_packed(
    state: dict[str, Tensor], prefix: str, shape: tuple[int, int], grid: Grid | None, dtype: torch.dtype
) -> tuple[Weight, StoredForm | None]:
    """Take a packed weight out of a state dict, and return it and how it was stored.

    Args:
        state: What ``packed_state`` gave; the tensors of the weight are removed.
        prefix: Of their names.
        shape: (out, in).
        grid: What codes mean, if there are any.
        dtype: To which decoded numbers are rounded.

    Raises:
        InputError: Tensors are missing, do not fit, or hold codes that nothing explains.
    """
    tensors = {part: state.pop(f"{prefix}{part}") for part in PARTS if f"{prefix}{part}" in state}
    layer = prefix.removesuffix(".")
    grid = grid if tensors["weight"].dtype == torch.uint8 else None
    sizes: dict[str, tuple[int, ...]] = {"scale": (shape[0], grid.groups(shape[1]))} if grid else {}
    sizes |= {"book": (1 << grid.bits,)} if grid and grid.levels == "book" else {}
    missing = {"U", "V", *sizes, *_scales_of(tensors)} - tensors.keys()
    if missing or (tensors["weight"].dtype == torch.uint8 and grid is None):
        what = f"lacks {min(missing)}" if missing else "holds codes, and nothing says of which grid"
        raise InputError(f"The state of {layer} {what}. Open the directory with sparlow.load.")
    for part, size in sizes.items():
        if tensors[part].shape != size:
            raise InputError(f"{layer}: Its {part} has the shape {tuple(tensors[part].shape)}, not {size}.")
    try:
        return unpack_weight(tensors, shape, grid, dtype)
    except InputError as problem:
        raise InputError(f"{layer}: {problem}") from None


def _scales_of(tensors: Mapping[str, Tensor]) -> list[str]:
    codes = [part for part in ("U", "V") if part in tensors and not tensors[part].is_floating_point()]
    return ["U_scale", "V_scale"] if codes else []


@torch.no_grad()
def unpack_weight(
    tensors: Mapping[str, Tensor], shape: tuple[int, int], grid: Grid | None, dtype: torch.dtype
) -> tuple[Weight, StoredForm | None]:
    """Return the weight that was packed, and how it was stored; None for floats.

    Args:
        tensors: By the last part of their names, their shapes and types checked.
        shape: (out, in).
        grid: That of the values; None for floats.
        dtype: To which decoded numbers are rounded.

    Raises:
        InputError: The values do not fit the mask, or codes, scales or books cannot be.
    """
    for part in ("scale", "book", "U_scale", "V_scale"):
        if part in tensors and not all_finite(tensors[part]):
            raise InputError(f"Its {part} holds numbers that are not finite. Restore the file.")
    mask = tensors.get("mask")
    values = None
    if grid is None:
        S = unpack(tensors["weight"], mask, shape)
    else:
        levels = tensors["book"] if grid.levels == "book" else grid.uniform().to(tensors["weight"].device)
        if bool((levels[1:] < levels[:-1]).any()):
            raise InputError("The levels of its book do not rise. Restore the file.")
        values = GridValues(grid, tensors["scale"], levels, mask is not None)
        S = _decoded(tensors["weight"], mask, shape, values, dtype)
    U, V = tensors["U"], tensors["V"]
    factors = None
    if "U_scale" in tensors:
        factors = FactorScales(tensors["U_scale"], tensors["V_scale"])
        if bool((U == -_LARGEST - 1).any()) or bool((V == -_LARGEST - 1).any()):
            raise InputError("Its factors hold the code -128, which is not in use. Restore the file.")
        U = _finite((U.float() * factors.U.float()).to(dtype) + 0.0)
        V = _finite((V.float() * factors.V.float()[:, None]).to(dtype) + 0.0)
    form = StoredForm(values, factors, dtype) if values or factors else None
    return Weight(S, U, V), form


def _decoded(
    data: Tensor, mask: Tensor | None, shape: tuple[int, int], values: GridValues, dtype: torch.dtype
) -> Tensor:
    out, columns = shape
    bits = values.grid.bits
    S = torch.zeros(shape, dtype=dtype, device=data.device)
    usable = torch.zeros(1 << bits, dtype=torch.bool, device=data.device)
    usable[values.usable()] = True
    if mask is not None:
        check_mask(mask, out, columns)
    start = 0
    for some, rows in _by_rows(values, columns):
        keep = None if mask is None else bits_of_bytes(mask[some], columns)
        counts = torch.full((len(S[some]),), columns, device=data.device) if keep is None else keep.sum(1)
        stop = start + int(row_bytes(counts, bits).sum())
        codes = unpack_codes(data[start:stop], counts, bits)
        start = stop
        if not bool(usable.all()) and not bool(usable[codes.int()].all()):
            raise InputError("Its codes have a level that is not in use. Restore the file.")
        if keep is None:
            S[some] = rows.decode(codes.view(-1, columns)) + 0.0
            continue
        full = torch.zeros(keep.shape, dtype=torch.uint8, device=data.device)
        full.view(-1).index_copy_(0, positions_of(keep), codes)
        S[some] = rows.decode(full).masked_fill(~keep, 0)
        if int((S[some] != 0).sum()) != len(codes):
            raise InputError("It keeps values that are zero. Restore the file.")
    if start != len(data):
        raise InputError(f"Its codes should take {start} bytes, but there are {len(data)}. Restore the file.")
    return _finite(S)


def _finite(decoded: Tensor) -> Tensor:
    if not all_finite(decoded):
        raise InputError(f"Its numbers leave the range of {decoded.dtype}. Restore the file.")
    return decoded
