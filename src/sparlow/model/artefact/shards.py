"""The files of a compressed model: written atomically, and checked before they are trusted."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sparlow.errors import InputError, RunError, reason
from sparlow.files import INDEX, SINGLE, read_json, replacing, require_printable, resolve_inside, sha256, shard_filename
from sparlow.model.artefact.bitmask import pack
from sparlow.model.artefact.layers import SparseLowRankLinear, compressed_layers
from sparlow.model.artefact.schemes import Scheme, StoredLayer, name_of, packed_shapes, packed_types, stored_pattern

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
}


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


def write_shard(path: Path, state: Mapping[str, Tensor]) -> ShardRecord:
    """Write tensors, from any device, as one safetensors file: the same tensors, the same bytes.

    Raises:
        RunError: A tensor has no content (it is on the meta device), or the file cannot be written.
    """
    with replacing(path) as partial:
        save_file(_apart(state), partial, {"format": "pt"})  # two keys would come in a random order
        return ShardRecord(path.name, partial.stat().st_size, sha256(partial))


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


def packed_state(root: nn.Module, *, without: str | None = None) -> dict[str, Tensor]:
    """Return the state dict of a module as it is stored: in place of each S its kept values, flat, and their mask.

    Flat, so that a loader that expects a matrix under this name stops instead of making one up.

    Args:
        without: Name of a submodule whose tensors are left out.

    Raises:
        InputError: Weights are off-loaded.
    """
    state = {k: t for k, t in root.state_dict().items() if without is None or not k.startswith(f"{without}.")}
    for name in compressed_layers(root):
        S = state.pop(f"{name}.S", None)
        if S is not None:
            if S.is_meta:
                raise InputError(f"{name} is off-loaded. Open the model without off-loading to save it.")
            values, mask = pack(S)
            state[f"{name}.weight"] = values.cpu()
            if len(values) < S.numel():
                state[f"{name}.mask"] = mask.cpu()
    return state


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
                found = {k: Header(file, _DTYPES.get(p.get_dtype()), tuple(p.get_shape())) for k, p in parts.items()}
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
    """Return how each compressed layer is stored, by name; what is compressed is seen from the tensors themselves.

    Args:
        headers: Of some shards.
        patterns: That the layers are known to obey, by name.
        transposed: Names of layers whose class stores the weight as (in, out).

    Raises:
        InputError: A tensor has a type that no layer is stored in.
    """
    found = {}
    for name, parts in by_layer(headers).items():
        if parts.keys() >= {"weight", "U", "V"} and len(parts["weight"].shape) == 1:
            shape, kept = _shape(name, parts), parts["weight"].shape[0]
            pattern = stored_pattern(shape, kept, (patterns or {}).get(name))
            values, factors = name_of(parts["weight"].dtype), name_of(parts["U"].dtype)
            scheme = Scheme(pattern, values, parts["U"].shape[1], factors, name in transposed)
            found[name] = StoredLayer(scheme, kept)
    return found


def _shape(name: str, parts: Mapping[str, Header]) -> tuple[int, int]:
    """Return (out, in) of a compressed layer, which U and V have even at rank 0."""
    sizes = [parts[part].shape for part in ("U", "V") if part in parts]
    if [len(size) for size in sizes] != [2, 2]:
        raise InputError(f"{name} has no matrices U and V.")
    return sizes[0][0], sizes[1][1]


def check_layer(name: str, parts: Mapping[str, Header], layer: SparseLowRankLinear, record: StoredLayer) -> None:
    """Check that the files hold exactly the tensors of a compressed layer, each with its shape and type.

    Args:
        layer: What they are for; it may be on the meta device.

    Raises:
        InputError: They do not.
    """
    check_parts(name, parts, record, shape=(layer.out_features, layer.in_features), bias=layer.bias is not None)


def check_parts(
    name: str,
    parts: Mapping[str, Header],
    record: StoredLayer,
    *,
    shape: tuple[int, int] | None = None,
    bias: bool | None = None,
) -> tuple[int, int]:
    """Check the same where there is no layer, whose shape (out, in) is then that of U and V; return the shape.

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
    types = packed_types(record)
    for part, size in expected.items():
        _, dtype, found = parts[part]
        right = dtype is not None and (dtype == types[part] if part in types else dtype.is_floating_point)
        if found != size or not right:
            wanted = f"{size} of {types.get(part, 'a float type')}"
            raise InputError(f"{name}.{part} should have the shape {wanted}, but the file holds {found} of {dtype}.")
    return shape
