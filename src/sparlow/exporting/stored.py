"""A compressed directory read for another program: one shard at a time, nothing opened that is not needed."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from sparlow.errors import InputError
from sparlow.files import CONFIG, RECORD, read_json
from sparlow.finite import all_finite
from sparlow.model.artefact.checksums import require_recorded
from sparlow.model.artefact.describe import in_blocks
from sparlow.model.artefact.hf_quantizer import SparlowConfig
from sparlow.model.artefact.schemes import METHOD, StoredLayer
from sparlow.model.artefact.shards import Header, by_layer, check_parts, read_headers, read_index
from sparlow.model.artefact.stored_form import StoredForm, unpack_weight
from sparlow.model.loading.place import require_result


@dataclass(frozen=True)
class Layer:
    """A compressed linear layer, decoded: W = S + U V.

    Attributes:
        name: In the model.
        S: (out, in).
        U: (out, rank).
        V: (rank, in).
        bias: (out,) or None.
        form: The grid that S lies on, if it does.
        transposed: Whether the model's own class stores the weight as (in, out).
    """

    name: str
    S: Tensor
    U: Tensor
    V: Tensor
    bias: Tensor | None
    form: StoredForm | None
    transposed: bool

    @property
    def rank(self) -> int:
        """Of U V."""
        return len(self.V)

    def merged(self) -> Tensor:
        """Return S + U V (out, in), rounded once to the type of S; InputError if it leaves its range."""
        if not self.rank:
            return self.S
        exact = torch.float64 if self.S.dtype == torch.float64 else torch.float32
        found = (self.S.to(exact) + self.U.to(exact) @ self.V.to(exact)).to(self.S.dtype)
        if not all_finite(found):
            raise InputError(f"{self.name}: S + U V leaves the range of {self.S.dtype}. Export lora.")
        return found

    def as_stored(self, weight: Tensor) -> Tensor:
        """Return a weight (out, in) as the model's class stores it."""
        return weight.T.contiguous() if self.transposed else weight


@dataclass(frozen=True)
class Shard:
    """What one file holds.

    Attributes:
        layers: The compressed linear layers, in order.
        others: All other tensors by name, an embedding or a head in few bits decoded.
    """

    layers: list[Layer]
    others: dict[str, Tensor]


class Stored:
    """A finished directory of sparlow. Opening it reads and checks the small files and the headers.

    Args:
        folder: The directory.

    Raises:
        InputError: It is none, or it is unfinished or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        require_result(folder)
        self._config = read_json(folder / CONFIG)
        found = self._config.get("quantization_config")
        if not isinstance(found, dict) or found.get("quant_method") != METHOD:
            raise InputError(f"{folder} is not a model that sparlow compressed. Give one that it wrote.")
        self.records: dict[str, StoredLayer] = SparlowConfig(**found).records
        if (folder / RECORD).exists():
            require_recorded(folder, self.run.get("opens_as") or {})
        index = read_index(folder)
        self.files = sorted(set(index.values()))
        self.headers: dict[str, Header] = read_headers(self.files)
        for name in index.keys() - self.headers.keys():
            raise InputError(f"{name} is not in {index[name].name}, where the index has it. Restore the file.")
        self._parts = by_layer(self.headers)
        blocks = in_blocks(self.records)
        for name, record in self.records.items():
            if name in self._parts or name in blocks:  # a head that is tied has no tensors of its own
                check_parts(name, self._parts.get(name, {}), record)
        self.layers: dict[str, StoredLayer] = blocks
        if not blocks:
            raise InputError(f"{folder} has no compressed layers, so any program opens what it was made of. Use that.")

    @property
    def config(self) -> dict[str, Any]:
        """config.json without what is sparlow's."""
        return {key: value for key, value in self._config.items() if key != "quantization_config"}

    @cached_property
    def run(self) -> dict[str, Any]:
        """What ``sparlow.json`` holds; empty if there is none."""
        return read_json(self.folder / RECORD) if (self.folder / RECORD).exists() else {}

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What decided the result; empty where nothing says it."""
        found = self.run.get("fingerprint", {})
        return found if isinstance(found, dict) else {}

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each layer that has a low-rank part, by name."""
        return {name: record.scheme.rank for name, record in self.layers.items() if record.scheme.rank}

    def shape(self, name: str) -> tuple[int, int]:
        """(out, in) of a compressed layer."""
        parts = self._parts[name]
        return parts["U"].shape[0], parts["V"].shape[1]

    def modules(self) -> list[str]:
        """Return the names of all modules that have tensors."""
        return sorted(self._parts)

    def outline(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the name and shape of each tensor of the dense model, in the order in which ``shards`` gives them."""
        for file in self.files:
            inside = self._inside(file)
            for name, parts in inside.items():
                if name in self.layers:
                    yield f"{name}.weight", self.shape(name)
                    yield from ((f"{name}.bias", parts["bias"].shape) for _ in range("bias" in parts))
            for name, parts in inside.items():
                if name in self.records and name not in self.layers:
                    yield f"{name}.weight", self.shape(name)
                    yield from ((f"{name}.bias", parts["bias"].shape) for _ in range("bias" in parts))
                elif name not in self.records:
                    yield from ((f"{name}.{part}" if name else part, header.shape) for part, header in parts.items())

    @cached_property
    def dense_bytes(self) -> dict[str, int]:
        """Bytes of each tensor of the dense model, in the types that it has here."""
        found = {}
        for name, shape in self.outline():
            record = self.records.get(name.removesuffix(".weight"))
            dtype = record.scheme.dtype if record else self.headers[name].dtype
            found[name] = prod(shape) * (dtype.itemsize if dtype else 8)  # of a type that is not known, the widest
        return found

    def _inside(self, file: Path) -> dict[str, dict[str, Header]]:
        return by_layer({name: header for name, header in self.headers.items() if header.file == file})

    def shards(self) -> Iterator[Shard]:
        """Yield the files' contents, one file after the other.

        Raises:
            InputError: A weight is damaged.
        """
        for file in self.files:
            yield self._read(file)

    def _read(self, file: Path) -> Shard:
        layers: list[Layer] = []
        others: dict[str, Tensor] = {}
        with safe_open(file, framework="pt") as shard:
            for module, parts in self._inside(file).items():
                tensors = {part: shard.get_tensor(f"{module}.{part}" if module else part) for part in parts}
                record = self.records.get(module)
                if record is None:
                    others |= {f"{module}.{part}" if module else part: t for part, t in tensors.items()}
                    continue
                bias = tensors.pop("bias", None)
                layer = _decoded(module, tensors, record, bias)
                if module in self.layers:
                    layers.append(layer)
                else:
                    others[f"{module}.weight"] = layer.S
                    others |= {} if bias is None else {f"{module}.bias": bias}
        return Shard(layers, others)


def _decoded(name: str, tensors: Mapping[str, Tensor], record: StoredLayer, bias: Tensor | None) -> Layer:
    shape = (tensors["U"].shape[0], tensors["V"].shape[1])
    try:
        (S, U, V), form = unpack_weight(tensors, shape, record.scheme.grid, record.scheme.dtype)
    except InputError as problem:
        raise InputError(f"{name}: {problem}") from None
    return Layer(name, S, U, V, bias, form, record.scheme.transposed)
