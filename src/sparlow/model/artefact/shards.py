"""The files of a compressed model: written atomically, and checked before they are trusted."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sparlow.errors import InputError, RunError, reason
from sparlow.files import INDEX, SINGLE, read_json, replacing, resolve_inside, sha256, shard_filename
from sparlow.model.artefact.bitmask import pack, packed_shapes
from sparlow.model.artefact.layers import SparseLowRankLinear, compressed_layers

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
    """Return the state dict of a module with values and mask in place of each S.

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
            state |= {f"{name}.values": values.cpu(), f"{name}.mask": mask.cpu()}
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


def layer_records(headers: Mapping[str, Header]) -> dict[str, dict[str, int]]:
    """Return how many values each compressed layer keeps and its rank, as ``config.json`` is to say it."""
    layers = {name: parts for name, parts in by_layer(headers).items() if parts.keys() >= {"values", "mask", "U", "V"}}
    return {name: {"kept": parts["values"].shape[0], "rank": parts["U"].shape[1]} for name, parts in layers.items()}


def check_layer(name: str, parts: Mapping[str, Header], layer: SparseLowRankLinear, record: Mapping[str, int]) -> None:
    """Check that the files hold exactly the tensors of a compressed layer, each with its shape.

    Args:
        layer: What they are for; it may be on the meta device.

    Raises:
        InputError: They do not.
    """
    check_parts(name, parts, (layer.out_features, layer.in_features), record, bias=layer.bias is not None)


def check_parts(
    name: str, parts: Mapping[str, Header], shape: tuple[int, int], record: Mapping[str, int], *, bias: bool
) -> None:
    """Check the same where there is no layer, only its shape (out, in).

    Raises:
        InputError: They do not.
    """
    expected = packed_shapes(shape, record["kept"], record["rank"]) | ({"bias": shape[:1]} if bias else {})
    if parts.keys() != expected.keys():
        raise InputError(f"{name} should have the tensors {', '.join(expected)}, but has {', '.join(parts) or 'none'}.")
    for part, size in expected.items():
        _, dtype, found = parts[part]
        if found != size or dtype is None or (dtype == torch.uint8) != (part == "mask"):
            raise InputError(f"{name}.{part} should have the shape {size}, but the file holds {found} of {dtype}.")
