"""Look into a compressed model on disk without opening it."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from sparlow.errors import InputError
from sparlow.files import read_json, sha256, shard_filename
from sparlow.finite import all_finite
from sparlow.model.artefact.schemes import Scheme, StoredLayer
from sparlow.model.artefact.shards import (
    Header,
    by_layer,
    check_parts,
    is_packed,
    read_headers,
    read_index,
    read_layers,
)
from sparlow.model.artefact.stored_form import unpack_weight


@dataclass(frozen=True)
class LayerInfo:
    """A compressed layer on disk.

    Attributes:
        shape: (out, in).
        kept: Number of values in the sparse part.
        density: The ratio kept / (out · in).
        bytes: Of all its tensors, the bias included.
        dtype: Of the values, as torch calls it, or int8, int4, int3, int2.
        outside: Whether it is not in a decoder block: an embedding or an output head in few bits.
    """

    name: str
    shape: tuple[int, int]
    kept: int
    density: float
    rank: int
    bytes: int
    dtype: str
    outside: bool = False


def describe(folder: Path) -> list[LayerInfo]:
    """List the packed weights of a directory, a head that is tied to the embedding with that; only headers are read.

    Raises:
        InputError: The directory is none of sparlow's, or is damaged.
    """
    layers = read_layers(Path(folder))
    parts = by_layer(read_headers(sorted(set(read_index(Path(folder)).values()))))
    tied = {name for name in layers if _is_outside(name) and name not in parts}
    if len(tied) == len([name for name in layers if _is_outside(name)]):
        tied = set()  # then the one that has the tensors is missing
    return [_layer_info(name, parts.get(name, {}), row) for name, row in layers.items() if name not in tied]


def in_blocks(records: Mapping[str, StoredLayer]) -> dict[str, StoredLayer]:
    """Return the records of compressed layers, without those of an embedding or a head in few bits."""
    return {name: row for name, row in records.items() if not _is_outside(name)}


def _is_outside(name: str) -> bool:
    """Whether a weight is in no decoder block; blocks have numbers."""
    return re.match(r".*?\.\d+\.", name) is None


@dataclass(frozen=True)
class Parameters:
    """How many parameters a directory stands for, each compressed weight with all of its entries.

    Attributes:
        model: All.
        blocks: Of the decoder blocks, of which at least one holds a compressed layer.
        compressed: Entries of the compressed weights.
    """

    model: int
    blocks: int
    compressed: int


def count_parameters(folder: Path) -> Parameters:
    """Count them; only headers are read. Tensors that are stored but not trained count with the others.

    Raises:
        InputError: the directory is none of sparlow's, or is damaged.
    """
    layers = {layer.name: prod(layer.shape) for layer in describe(folder)}
    sizes: dict[str, int] = {}
    for name, parts in by_layer(read_headers(sorted(set(read_index(Path(folder)).values())))).items():
        own = [parts["bias"]] if name in layers and "bias" in parts else [] if name in layers else parts.values()
        sizes[name] = layers.get(name, 0) + sum(prod(header.shape) for header in own)
    blocks = {found[0] for name in layers if (found := re.match(r".*?\.\d+\.", name))}
    lists = tuple({re.sub(r"\d+\.$", "", block) for block in blocks})
    compressed = sum(size for name, size in layers.items() if not _is_outside(name))
    blocks_size = sum(n for name, n in sizes.items() if lists and name.startswith(lists))
    return Parameters(sum(sizes.values()), blocks_size, compressed)


def _layer_info(name: str, parts: dict[str, Header], record: StoredLayer) -> LayerInfo:
    shape = check_parts(name, parts, record)
    size = sum(prod(h.shape) * h.dtype.itemsize for h in parts.values() if h.dtype is not None)
    scheme = record.scheme
    dtype = scheme.values if scheme.grid else str(parts["weight"].dtype).removeprefix("torch.")
    density = record.kept / prod(shape)
    return LayerInfo(name, shape, record.kept, density, scheme.rank, size, dtype, _is_outside(name))


def verify(folder: Path, check_pattern: Callable[[str, Tensor], str | None] | None = None) -> list[str]:
    """Read a whole directory and return what is wrong with it, one sentence each.

    Args:
        folder: If it holds ``sparlow.json``, every file is compared to the size and checksum recorded there.
        check_pattern: Given each layer's name and S (out, in), says what is wrong or nothing.

    Raises:
        InputError: The directory is none of sparlow's.
    """
    folder = Path(folder)
    records = read_layers(folder)
    problems = _checksum_problems(folder)
    try:
        index, layers = read_index(folder), describe(folder)
        headers = read_headers(sorted(set(index.values())))
    except InputError as problem:
        return [*problems, str(problem)]
    problems += [f"{name} is not in {file.name}." for name, file in index.items() if name not in headers]
    shard = {layer.name: headers[f"{layer.name}.weight"].file for layer in layers}
    found = (_layer_problem(layer, records[layer.name].scheme, shard[layer.name], check_pattern) for layer in layers)
    return problems + [problem for problem in found if problem]


def changed_sparse_parts(before: Path, after: Path) -> list[str]:
    """Return the layers of which S differs, in support or in any bit of a value, between two directories.

    Args:
        before: A finished directory.
        after: One of the same model; its shards are enough.

    Raises:
        InputError: A shard is missing or damaged.
    """
    old = read_headers(sorted(set(read_index(Path(before)).values())))
    new = read_headers(sorted(Path(after).glob("*.safetensors")))
    layers = [name for headers in (old, new) for name, parts in by_layer(headers).items() if is_packed(parts)]
    parts = [f"{layer}.{part}" for layer in layers for part in ("weight", "mask", "scale", "book")]
    changed = [name for name in parts if not _same(name, old.get(name), new.get(name))]
    return sorted({name.rpartition(".")[0] for name in changed})


def _same(name: str, one: Header | None, other: Header | None) -> bool:
    if one is None or other is None:
        return one is other
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with safe_open(one.file, framework="pt") as old, safe_open(other.file, framework="pt") as new:
        return torch.equal(old.get_tensor(name).view(torch.uint8), new.get_tensor(name).view(torch.uint8))


def _checksum_problems(folder: Path) -> list[str]:
    if not (folder / "sparlow.json").exists():
        return []
    recorded = read_json(folder / "sparlow.json").get("shards", {})
    present = {file.name for file in folder.glob("*.safetensors")}
    problems = [f"The shard {name} is not recorded in sparlow.json." for name in sorted(present - recorded.keys())]
    for name, record in recorded.items():
        file = folder / shard_filename(name)
        if not file.exists():
            problems.append(f"The shard {name} is missing.")
        elif record != {"bytes": file.stat().st_size, "sha256": sha256(file)}:
            problems.append(f"The shard {name} is not the one that was written: its checksum differs.")
    return problems


def _layer_problem(
    layer: LayerInfo, scheme: Scheme, file: Path, check_pattern: Callable[[str, Tensor], str | None] | None
) -> str | None:
    """Say what is wrong with a layer whose tensors all lie in one file, which a shard is."""
    with safe_open(file, framework="pt") as shard:
        there = set(shard.keys())
        names = {part: f"{layer.name}.{part}" for part in scheme.parts}
        parts = {part: shard.get_tensor(name) for part, name in names.items() if name in there}
    try:
        (S, U, V), _ = unpack_weight(parts, layer.shape, scheme.grid, scheme.dtype)
    except InputError as problem:
        return f"{layer.name}: {problem}"
    if not all(all_finite(part) for part in (S, U, V)):
        return f"{layer.name} holds numbers that are not finite."
    return check_pattern(layer.name, S) if check_pattern and not layer.outside else None
