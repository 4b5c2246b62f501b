"""The files of a compressed model: written atomically, and checked before they are trusted.

A shard with codes of few bits says in its own header, under ``sparlow``, how its layers are stored, as config.json will
say it at the end: bytes alone do not tell three bits from four.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparlow.errors import InputError, RunError, reason
from sparlow.files import (
    CONFIG,
    INDEX,
    SINGLE,
    read_json,
    replacing,
    require_printable,
    resolve_inside,
    sha256,
    shard_filename,
)
from sparlow.model.artefact.schemes import (
    METHOD,
    Scheme,
    StoredLayer,
    from_config,
    longest_codes,
    name_of,
    packed_shapes,
    packed_types,
    records_from,
    stored_pattern,
    to_config,
)

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
    "I8": torch.int8,
}
_SCHEMES = "sparlow"  # the key in a shard's header


@dataclass(frozen=True)
class ShardRecord:
    """A file that was written: its name in the directory, its size in bytes and its SHA-256 in hexadecimal digits."""

    file: str
    bytes: int
    sha256: str


class Header(NamedTuple):
    """The header of a tensor in a safetensors file; the dtype is None if no compressed layer may have it."""

    file: Path
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    floats: bool = True  # whether the type is one of floating-point numbers, of whatever width


def _header(file: Path, dtype: str, shape: Iterable[int]) -> Header:
    return Header(file, _DTYPES.get(dtype), tuple(shape), dtype.startswith(("F", "BF")))


def write_shard(
    path: Path, state: Mapping[str, Tensor], records: Mapping[str, StoredLayer] | None = None
) -> ShardRecord:
    """Write tensors, from any device, as one safetensors file: the same tensors, the same bytes.

    Args:
        path: The file.
        state: The tensors.
        records: How layers are stored, where the tensors alone do not tell.

    Raises:
        RunError: A tensor has no content (it is on the meta device), or the file cannot be written.
    """
    schemes = {_SCHEMES: json.dumps(to_config(records), separators=(",", ":"))} if records else {}
    with replacing(path) as partial:
        save_file(_apart(state), partial, {"format": "pt", **schemes})
        if schemes:
            _put_in_order(partial)
        return ShardRecord(path.name, partial.stat().st_size, sha256(partial))


def _put_in_order(path: Path) -> None:
    """Sort the metadata in a file's header, which safetensors writes in a random order."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > size:
            raise RunError(f"The header of {path.name} has an unknown form. Install another release of safetensors.")
        file.seek(8)
        file.write(text.ljust(size))


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors on the CPU, none in the memory of another: safetensors would refuse to write those."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in state.items():
        if tensor.is_meta:
            raise RunError(f"{name} cannot be saved, because it was never loaded.")
        t = tensor.detach().cpu().contiguous()
        tensors[name] = t.clone() if t.untyped_storage().data_ptr() in seen else t
        seen.add(t.untyped_storage().data_ptr())
    return tensors


def read_layers(folder: Path) -> dict[str, StoredLayer]:
    """Return how a directory's compressed layers are stored, by name.

    Raises:
        InputError: It is no finished directory of sparlow, or one of a newer sparlow.
    """
    found = read_json(folder / CONFIG).get("quantization_config")
    if not isinstance(found, dict) or found.get("quant_method") != METHOD:
        raise InputError(f"{folder} is not a model that sparlow compressed. Give one that it wrote.")
    rest = {name: value for name, value in found.items() if name != "quant_method"}
    return records_from({"format": None, "schemes": (), "layers": None, **rest}) if rest else {}


def read_index(folder: Path) -> dict[str, Path]:
    """Return the file of each tensor.

    Raises:
        InputError: There is no index, or it leads out of the directory.
    """
    if not (folder / INDEX).exists() and (folder / SINGLE).exists():
        file = resolve_inside(folder, SINGLE)
        return dict.fromkeys(read_headers([file]), file)
    files = read_json(folder / INDEX).get("weight_map")
    if not isinstance(files, dict):
        raise InputError(f"{folder / INDEX} has no weight_map. Restore it.")
    for name in files:
        require_printable(name)
    inside = {file: resolve_inside(folder, shard_filename(file)) for file in set(map(str, files.values()))}
    return {name: inside[str(file)] for name, file in files.items()}


def read_headers(files: Iterable[Path]) -> dict[str, Header]:
    """Return the header of each tensor in some safetensors files; contents are not read.

    Raises:
        InputError: A file is missing or damaged, or two hold the same tensor.
    """
    headers: dict[str, Header] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as shard:
                parts = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118 - not a dict
                found = {k: _header(file, p.get_dtype(), p.get_shape()) for k, p in parts.items()}
        except FileNotFoundError as problem:
            raise InputError(f"The shard {file} is missing. Restore it.") from problem
        except (SafetensorError, OSError) as problem:
            raise InputError(f"The shard {file} is damaged ({reason(problem)}). Restore it.") from problem
        for name in found:
            require_printable(name)
        for name in found.keys() & headers.keys():
            raise InputError(f"{name} is both in {headers[name].file.name} and in {file.name}.")
        headers |= found
    return headers


def by_layer(headers: Mapping[str, Header]) -> dict[str, dict[str, Header]]:
    """Return the headers by module, then by the last part of the name."""
    found: dict[str, dict[str, Header]] = {}
    for name, header in headers.items():
        layer, _, last = name.rpartition(".")
        found.setdefault(layer, {})[last] = header
    return found


def layer_records(
    headers: Mapping[str, Header], patterns: Mapping[str, str] | None = None, transposed: Collection[str] = ()
) -> dict[str, StoredLayer]:
    """Return how each compressed layer is stored, by name.

    What is compressed is seen from the tensors themselves; of codes, the shard's header says what they mean.

    Args:
        headers: Of some shards.
        patterns: That the layers are known to obey, by name.
        transposed: Names of layers whose class stores the weight as (in, out).

    Raises:
        InputError: A tensor has a type that no layer is stored in, or nothing says what codes mean.
    """
    known = {name: row for file in sorted({header.file for header in headers.values()}) for name, row in _said(file)}
    found = dict(known)
    for name, parts in by_layer(headers).items():
        if not is_packed(parts):
            continue
        shape = _shape(name, parts)
        row = known.get(name)
        if row is None and parts["weight"].dtype == torch.uint8:
            raise InputError(f"{name} is stored in codes, and the shard does not say of which grid. Restore it.")
        if row is None:
            values, factors = name_of(parts["weight"].dtype), name_of(parts["U"].dtype)
            row = StoredLayer(Scheme("", values, parts["U"].shape[1], factors), parts["weight"].shape[0])
        pattern = stored_pattern(shape, row.kept, (patterns or {}).get(name))
        found[name] = replace(row, scheme=replace(row.scheme, pattern=pattern, transposed=name in transposed))
    return found


def is_packed(parts: Mapping[str, Header]) -> bool:
    """Whether the tensors of a module, by the last part of their names, are those of a packed weight."""
    return parts.keys() >= {"weight", "U", "V"} and len(parts["weight"].shape) == 1


def _said(file: Path) -> Iterable[tuple[str, StoredLayer]]:
    """Return what a shard's header says of how layers are stored."""
    with safe_open(file, framework="pt") as shard:
        text: str | None = (shard.metadata() or {}).get(_SCHEMES)
    if text is None:
        return ()
    try:
        about: dict[str, Any] = json.loads(text)
        return from_config(about.get("schemes"), about.get("layers")).items()
    except (ValueError, AttributeError, RecursionError, InputError) as problem:
        raise InputError(f"The shard {file} is damaged ({reason(problem)}). Restore it.") from problem


def _shape(name: str, parts: Mapping[str, Header]) -> tuple[int, int]:
    """Return (out, in) of a compressed layer, which U and V have even at rank 0."""
    sizes = [parts[part].shape for part in ("U", "V") if part in parts]
    if [len(size) for size in sizes] != [2, 2]:
        raise InputError(f"{name} has no matrices U and V.")
    return sizes[0][0], sizes[1][1]


def check_parts(
    name: str,
    parts: Mapping[str, Header],
    record: StoredLayer,
    *,
    shape: tuple[int, int] | None = None,
    bias: bool | None = None,
) -> tuple[int, int]:
    """Check that the files hold exactly the tensors of a packed weight, each with its shape and type.

    Args:
        name: Of the layer.
        parts: Its tensors, by the last part of their names.
        record: How it is stored.
        shape: (out, in) of the layer that they are for, if there is one; else the shape is that of U and V.
        bias: Whether it has a bias; left out where there is no layer.

    Returns:
        The shape.

    Raises:
        InputError: They do not.
    """
    shape = shape or _shape(name, parts)
    bias = "bias" in parts if bias is None else bias
    try:
        expected = packed_shapes(shape, record) | ({"bias": shape[:1]} if bias else {})
    except InputError as problem:
        raise InputError(f"{name}: {problem}") from None
    if parts.keys() != expected.keys():
        raise InputError(f"{name} should have the tensors {', '.join(expected)}, but has {', '.join(parts) or 'none'}.")
    types = packed_types(record.scheme)
    for part, size in expected.items():
        dtype, found = parts[part].dtype, parts[part].shape
        right = dtype is not None and (dtype in types[part] if part in types else dtype.is_floating_point)
        fits = found == size or (
            part == "weight" and len(found) == 1 and size[0] <= found[0] <= longest_codes(shape, record)
        )
        if not fits or not right:
            allowed = " or ".join(map(str, types.get(part, ("a float type",))))
            raise InputError(
                f"{name}.{part} should have the shape {size} of {allowed}, but the file holds {found} of {dtype}."
            )
    return shape
