"""How each compressed layer is stored, as ``quantization_config`` in config.json says it: format 2 of the artefact.

Few schemes serve many layers, so that the file stays small: ``layers`` gives each layer the number of its scheme, and
how many values it keeps. The format knows more than this release writes and reads (experts in one tensor): what is not
read yet is refused by the layer's name and never guessed. docs/format.md has the whole layout.
"""

import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from math import prod
from typing import Any

import torch

from sparlow.errors import InputError
from sparlow.files import require_printable
from sparlow.linalg.grid import BITS, LEVELS, WHOLE_ROW, Grid, packed_row_bytes
from sparlow.model.artefact.bitmask import mask_bytes
from sparlow.model.artefact.stored_form import SCALE_TYPES

METHOD = "sparlow"
FORMAT = 2  # raised when an older sparlow would misread what this one writes
FREE, DENSE = "free", "dense"  # patterns beside N:M: any entries, and all of them

FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
INT8 = "int8"  # of factors
_NAMES = {dtype: name for name, dtype in FLOATS.items()}
_KEYS = ("pattern", "values", "rank", "factors")
_OF_GRIDS = ("levels", "group")  # where values are integers
_OF_CODES = "decoded"  # where values or factors are
_LATER = "which was written by a newer sparlow, or is not supported yet. Upgrade sparlow."
_DEEPEST, _LONGEST = 50, 500  # parts and characters of a layer's name
_LARGEST = 2**40  # a count beyond this is no count


@dataclass(frozen=True)
class Scheme:
    """What layers that are stored alike have in common.

    Attributes:
        pattern: N:M, ``free`` or ``dense``.
        values: Type of the kept values, a key of ``FLOATS`` or of ``BITS``.
        rank: Of U V.
        factors: Type of U and V, a key of ``FLOATS`` or ``int8``.
        transposed: Whether the model's own class stores the weight as (in, out).
        grid: Of integer values; None for floats.
        decoded: The type, a key of ``FLOATS``, to which decoded numbers are rounded; None if all are floats.
    """

    pattern: str
    values: str
    rank: int
    factors: str
    transposed: bool = False
    grid: Grid | None = None
    decoded: str | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The type in which the weight is read."""
        return FLOATS[self.decoded or self.values]

    @property
    def parts(self) -> list[str]:
        """The last part of the names of its tensors but for a bias, in order."""
        found = ["weight"] + ([] if self.pattern == DENSE else ["mask"])
        if self.grid:
            found += ["scale"] + (["book"] if self.grid.levels == "book" else [])
        return [*found, "U", "V", *(["U_scale", "V_scale"] if self.factors == INT8 else [])]

    def to_dict(self) -> dict[str, Any]:
        """Return the scheme as config.json has it."""
        found = {key: getattr(self, key) for key in _KEYS}
        if self.grid:
            found |= {"levels": self.grid.levels, "group": self.grid.group or WHOLE_ROW}
        if self.decoded:
            found[_OF_CODES] = self.decoded
        return found | {"transposed": True} if self.transposed else found


@dataclass(frozen=True)
class StoredLayer:
    """A compressed layer: its scheme, and the number of values it keeps."""

    scheme: Scheme
    kept: int


def stored_pattern(shape: tuple[int, int], kept: int, asked: str | None) -> str:
    """Return the pattern that a layer of this shape (out, in) is stored under.

    Args:
        shape: Of the weight.
        kept: Entries that are not zero.
        asked: The pattern that the layer obeys. Where it is N:M and nothing more could be kept, every group holds
            exactly N, so that a row's start is known without its mask; with fewer values it is stored as ``free``.
    """
    if kept == prod(shape):
        return DENSE
    groups = _groups(asked or "")
    return asked if asked and groups and kept == _kept_of(groups, shape) else FREE


def name_of(dtype: torch.dtype | None) -> str:
    """Return what the format calls a float type."""
    if dtype not in _NAMES:
        raise InputError(f"Values of type {dtype} cannot be stored.")
    return _NAMES[dtype]


def to_config(records: Mapping[str, StoredLayer]) -> dict[str, Any]:
    """Return ``schemes`` and ``layers`` of config.json."""
    numbers: dict[Scheme, int] = {}
    by_name = sorted(records.items())  # the order in which they are packed differs, and the files are not to
    layers = {name: [numbers.setdefault(row.scheme, len(numbers)), row.kept] for name, row in by_name}
    return {"schemes": [scheme.to_dict() for scheme in numbers], "layers": layers}


def records_from(config: Mapping[str, Any]) -> dict[str, StoredLayer]:
    """Read ``quantization_config`` without its ``quant_method``.

    Raises:
        InputError: Another version wrote it, or it is none.
    """
    found = config.get("format")
    if type(found) is not int or found != FORMAT:
        older = type(found) is int and found < FORMAT
        age, advice = ("an older", "Compress the model again.") if older else ("a newer", "Upgrade sparlow.")
        raise InputError(
            f"The model was written by {age} sparlow (format {found!r}, this one reads {FORMAT}). {advice}"
        )
    for key in sorted(config.keys() - {"format", "schemes", "layers"})[:1]:
        raise InputError(f"quantization_config has {key!r}, which a newer sparlow wrote. Upgrade sparlow.")
    return from_config(config.get("schemes"), config.get("layers"))


def from_config(schemes: Any, layers: Any) -> dict[str, StoredLayer]:  # noqa: ANN401 - what a JSON file holds
    """Read ``schemes`` and ``layers`` of config.json.

    Raises:
        InputError: They say something that this release does not know, about the layer that is named.
    """
    if not isinstance(schemes, list) or not isinstance(layers, dict):
        raise InputError("quantization_config must have a list of schemes, and layers by name. Restore config.json.")
    known: dict[int, Scheme] = {}
    found = {}
    for name, row in layers.items():
        require_printable(name)
        if "\\" in name or name.count(".") > _DEEPEST or len(name) > _LONGEST:
            raise InputError(f"{name[:_LONGEST]!r} is not the name of a layer. Restore config.json.")
        try:
            number, kept = _counts(row, len(schemes))
            if number not in known:
                known[number] = _scheme(schemes[number])
        except InputError as problem:
            raise InputError(f"{name}: {problem}") from None
        found[name] = StoredLayer(known[number], kept)
    return found


def _counts(row: object, schemes: int) -> tuple[int, int]:
    if not isinstance(row, list) or len(row) != 2:  # noqa: PLR2004 - a pair
        raise InputError("Its record must be [scheme, kept]. Restore config.json.")
    number, kept = row
    if isinstance(kept, list):
        raise InputError(f"Its experts are stored in one tensor, {_LATER}")
    if type(number) is not int or not 0 <= number < schemes:
        raise InputError(f"It has the scheme {number!r}, and there are {schemes} schemes. Restore config.json.")
    if type(kept) is not int or not 0 <= kept <= _LARGEST:
        raise InputError(f"It keeps {kept!r} values, which is no count. Restore config.json.")
    return number, kept


def _scheme(data: object) -> Scheme:
    if not isinstance(data, dict):
        raise InputError("Its scheme must be an object. Restore config.json.")
    values, factors, decoded = data.get("values"), data.get("factors"), data.get(_OF_CODES)
    for key, found, integers in (("values", values, [*BITS]), ("factors", factors, [INT8])):
        if key in data and found not in [*FLOATS, *integers]:  # lists: what a file holds may have no hash
            raise InputError(f"Its {key} have the type {found!r}, {_LATER}")
    on_grid = values in [*BITS]
    coded = on_grid or factors == INT8
    _require_keys(data, [*_KEYS, *(_OF_GRIDS if on_grid else ()), *([_OF_CODES] if coded else [])])
    pattern, rank, transposed = data["pattern"], data["rank"], data.get("transposed", False)
    if pattern not in [FREE, DENSE] and not _groups(pattern):
        raise InputError(f"Its pattern is {pattern!r}, {_LATER}")
    if type(rank) is not int or not 0 <= rank <= _LARGEST or type(transposed) is not bool:
        raise InputError("Its scheme must have a count as rank, and may be transposed or not. Restore config.json.")
    if coded and (decoded not in [*FLOATS] or values in FLOATS.keys() - {decoded}):
        raise InputError(f"Its numbers are decoded to the type {decoded!r}, {_LATER}")
    grid = _grid(BITS[str(values)], data["levels"], data["group"]) if on_grid else None
    return Scheme(pattern, str(values), rank, str(factors), transposed, grid, decoded)


def _require_keys(data: Mapping[str, Any], wanted: Collection[str]) -> None:
    for key in sorted(data.keys() - {*wanted, "transposed"})[:1]:
        raise InputError(f"Its scheme has {key!r}, {_LATER}")
    for key in wanted:
        if key not in data:
            raise InputError(f"Its scheme lacks {key!r}. Restore config.json.")


def _grid(bits: int, levels: object, group: object) -> Grid:
    if levels not in [*LEVELS]:
        raise InputError(f"Its levels are {levels!r}, {_LATER}")
    if group != WHOLE_ROW and (type(group) is not int or not 0 < group <= _LARGEST):
        raise InputError(f"A scale of it is shared by {group!r} columns, which is no count. Restore config.json.")
    return Grid(bits, str(levels), group if type(group) is int else None)


def packed_shapes(shape: tuple[int, int], record: StoredLayer) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a compressed layer's tensors in a file, by the last part of their names.

    Of codes whose rows hold different numbers, ``weight`` is the shortest that they may take, see ``longest_codes``.

    Raises:
        InputError: A weight of this shape (out, in) cannot keep so many values under its pattern.
    """
    out, features = shape
    scheme, kept = record.scheme, record.kept
    groups = _groups(scheme.pattern)
    right = kept == prod(shape) if scheme.pattern == DENSE else kept < prod(shape) or not kept
    if not (kept == _kept_of(groups, shape) if groups else right):
        raise InputError(
            f"It keeps {kept} values, which a ({out}, {features}) weight of the pattern {scheme.pattern} cannot."
        )
    grid, rank = scheme.grid, scheme.rank
    size = kept
    if grid:
        free = scheme.pattern == FREE
        size = packed_row_bytes(kept, grid.bits) if free else out * packed_row_bytes(kept // max(out, 1), grid.bits)
    every = {
        "weight": (size,),
        "mask": (out, mask_bytes(features)),
        "scale": (out, grid.groups(features) if grid else 0),
        "book": (1 << (grid.bits if grid else 0),),
        "U": (out, rank),
        "V": (rank, features),
        "U_scale": (rank,),
        "V_scale": (rank,),
    }
    return {part: every[part] for part in scheme.parts}


def longest_codes(shape: tuple[int, int], record: StoredLayer) -> int:
    """Return the most entries that ``weight`` may have: each row may waste all but a bit of its last byte."""
    grid = record.scheme.grid
    if grid and record.scheme.pattern == FREE:
        return (record.kept * grid.bits + 7 * shape[0]) // 8
    return packed_shapes(shape, record)["weight"][0]


def packed_types(scheme: Scheme) -> dict[str, tuple[torch.dtype, ...]]:
    """Return the types that the same tensors may have."""
    values = torch.uint8 if scheme.grid else FLOATS[scheme.values]
    factors = torch.int8 if scheme.factors == INT8 else FLOATS[scheme.factors]
    every = {"weight": (values,), "mask": (torch.uint8,), "U": (factors,), "V": (factors,)}
    return {part: every.get(part, SCALE_TYPES) for part in scheme.parts}


def any_of(names: Iterable[str], deepest: int = 50) -> str:
    """Return a regular expression, without groups that capture, of exactly these names.

    It branches character by character, so that a search in it takes as long for thousands of names as for a few.

    Args:
        names: Any texts.
        deepest: How many branches may lie within each other; ``re`` cannot read hundreds.
    """
    found = sorted(set(names))
    same = os.path.commonprefix(found) if deepest else ""  # noqa: RUF071 - characters are meant
    ends = [name[len(same) :] for name in found]
    groups = [[*group] for _, group in groupby(filter(None, ends), key=lambda end: end[0])]
    branches = [any_of(group, deepest - 1) for group in groups] if deepest else [re.escape(end) for end in ends if end]
    after = f"(?:{'|'.join(branches)})" + ("?" if "" in ends else "") if branches else ""
    return re.escape(same) + after


def _groups(pattern: object) -> tuple[int, int] | None:
    """Return N and M of a pattern N:M with 0 < N < M."""
    found = re.fullmatch(r"([1-9]\d{0,5}):([1-9]\d{0,5})", pattern) if isinstance(pattern, str) else None
    n, m = (int(found[1]), int(found[2])) if found else (0, 0)
    return (n, m) if n < m else None


def _kept_of(groups: tuple[int, int], shape: tuple[int, int]) -> int | None:
    """Return how many entries a weight (out, in) keeps where every M columns hold N; None if M does not divide in."""
    (n, m), (out, features) = groups, shape
    return None if features % m else out * features // m * n
