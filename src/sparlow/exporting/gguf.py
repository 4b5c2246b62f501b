"""``gguf``: one file for llama.cpp and Ollama, and an adapter in a second one where S and U V are to stay apart."""

import importlib.util
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor

from sparlow.errors import InputError
from sparlow.exporting._registry import Exported, Writer, form
from sparlow.exporting.adapter import padded
from sparlow.exporting.directory import copy_companions, meta_model_of
from sparlow.exporting.experts import require_no_experts
from sparlow.exporting.gguf_blocks import BITS, byte_shape, converted, exact_blocks, is_exact, type_of
from sparlow.exporting.gguf_families import (
    MERGE,
    Family,
    dealt_rows,
    family_of,
    heads_of,
    rotary_factors,
    settings,
)
from sparlow.exporting.gguf_tokenizer import tokenizer_fields
from sparlow.exporting.lora import adapter_bytes, require_adapter
from sparlow.exporting.stored import Layer, Stored
from sparlow.files import replacing
from sparlow.progress import Notify, counting
from sparlow.schema import Doc

MODEL, ADAPTER = "model.gguf", "adapter.gguf"
_TYPES = {"f32": "F32", "f16": "F16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
_FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7}  # general.file_type
_OUTSIDE = {"q4_0": "q8_0"}  # type of embedding and head, where it is not that of the layers
Type = Annotated[
    Literal["q8_0", "q4_0", "f16"],
    Doc("Type of the matrices. q4_0 keeps int4 with the levels integer exactly, and rounds all else."),
]
Weights = Annotated[
    Literal["merged", "sparse"],
    Doc("Either merged (S + U V in one file) or sparse (S, and U V as an adapter in a second file)."),
]


class Entry(NamedTuple):
    """A tensor that is to be written: its name in GGUF, its shape, its type."""

    name: str
    shape: tuple[int, ...]
    kind: str


@form(
    "gguf",
    keeps="the function, rounded to 8 or 4 bits; levels `integer` and `half` exactly with --option weights=sparse",
    loses="the mask; learned levels are rounded; q4_0 rounds whatever is not int4 with levels `integer`",
    opened_by=("llama.cpp", "Ollama", "LM Studio"),
)
def gguf(stored: Stored, *, type: Type = "q8_0", weights: Weights = "merged") -> Writer:  # noqa: A002 - as typed
    """One GGUF file of S + U V with the tokenizer, or S and a GGUF adapter, for llama.cpp and Ollama."""
    require_no_experts(stored, meta_model_of(stored), "GGUF", MERGE)
    if importlib.util.find_spec("gguf") is None:
        raise InputError("Writing GGUF needs the package gguf. Run: pip install 'sparlow[gguf]'")
    family = family_of(stored.config)
    rank = require_adapter(stored, stored.ranks) if weights == "sparse" and stored.ranks else 0
    file = _File(stored, family, type, sparse=weights == "sparse")
    entries = list(file.outline())
    fields = _fields(stored, family, type)

    def write(folder: Path, notify: Notify) -> Exported:
        with replacing(folder / MODEL) as partial:
            file.write(partial, fields, entries, notify)
        if rank:
            with replacing(folder / ADAPTER) as partial:
                file.write_adapter(partial, rank)
        copy_companions(stored, folder)
        found = Exported("gguf", folder, notes=file.notes())
        adapter = f" --lora OUT/{ADAPTER}" if rank else ""
        found.commands = [f"llama.cpp: llama-cli -m OUT/{MODEL}{adapter} -p Hello"]
        lines = f"FROM OUT/{MODEL}" + (f" and ADAPTER OUT/{ADAPTER}" if rank else "")
        found.commands.append(f"Ollama: a Modelfile of {lines}, then ollama create NAME -f Modelfile")
        return found

    return Writer(write, sum(map(_bytes, entries)) + (adapter_bytes(stored, rank, 4) if rank else 0))


class _File:
    """The tensors of a model in GGUF, in the order in which they are read.

    Args:
        stored: The model.
        family: Its.
        kind: Type of the matrices.
        sparse: Write S alone; else S + U V.
    """

    def __init__(self, stored: Stored, family: Family, kind: str, *, sparse: bool) -> None:
        from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES
        from gguf.tensor_mapping import get_tensor_name_map

        self._stored, self._family, self._kind, self._sparse = stored, family, kind, sparse
        self._arch = next(arch for arch in MODEL_ARCH if MODEL_ARCH_NAMES.get(arch) == family.arch)
        self._names = get_tensor_name_map(self._arch, stored.config["num_hidden_layers"])
        self._exact = self._rounded = self._wide = 0
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}

    def outline(self) -> Iterator[Entry]:
        """Yield every tensor in order; InputError if one has no name in GGUF."""
        if rotary_factors(self._stored.config) is not None:
            yield Entry("rope_freqs.weight", tuple(self._rotary().shape), "f32")
        for name, shape in self._stored.outline():
            inside = name.rpartition(".")[0] in self._stored.layers
            wanted = self._kind if inside else _OUTSIDE.get(self._kind, self._kind)
            yield Entry(self._name(name), shape, type_of(shape, wanted))

    def _rotary(self) -> Tensor:
        found = rotary_factors(self._stored.config)
        if found is None:
            raise InputError("The model does not scale its rotary frequencies one by one.")
        return found

    def _name(self, name: str) -> str:
        found: str | None = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise InputError(f"GGUF has no name for {name} in models of the kind {self._family.arch}. Export merged.")
        return found

    def write(self, path: Path, fields: dict[str, Any], entries: list[Entry], notify: Notify) -> None:
        """Write the file; one shard of the model at a time is in memory."""
        writer = _writer(path, self._family.arch, fields)
        for entry in entries:
            _announce(writer, entry)
        _begin(writer)
        advance = counting(notify, "exporting shards", len(self._stored.files))
        left = iter(entries)
        if rotary_factors(self._stored.config) is not None:
            writer.write_tensor_data(converted(self._rotary(), next(left).kind, ""))
        for shard in self._stored.shards():
            for layer in shard.layers:
                writer.write_tensor_data(self._matrix(layer, next(left).kind))
                if layer.bias is not None:
                    writer.write_tensor_data(self._plain(f"{layer.name}.bias", layer.bias, next(left).kind))
            for name, tensor in shard.others.items():
                writer.write_tensor_data(self._plain(name, tensor, next(left).kind))
            advance(1)
        writer.close()

    def _dealt(self, name: str) -> Callable[[Tensor], Tensor]:
        heads = heads_of(self._stored.config, name.rpartition(".")[0]) if self._family.dealt else None
        return lambda tensor: dealt_rows(tensor, heads) if heads else tensor

    def _matrix(self, layer: Layer, kind: str) -> Any:  # noqa: ANN401 - a numpy array
        order = self._dealt(f"{layer.name}.weight")
        if self._sparse and layer.rank:
            self._factors[layer.name] = order(layer.U), layer.V
        if kind in BITS and (self._sparse or not layer.rank) and is_exact(layer, kind):
            self._exact += 1
            return _rows(exact_blocks(layer, kind), order)
        self._rounded += kind in BITS
        self._wide += kind == "f16" and self._kind != "f16"
        return converted(order(layer.S if self._sparse else layer.merged()), kind, layer.name)

    def _plain(self, name: str, tensor: Tensor, kind: str) -> Any:  # noqa: ANN401 - a numpy array
        if self._family.norms_from_zero and tensor.ndim == 1 and name.endswith("norm.weight"):
            tensor = tensor.float() + 1
        return converted(self._dealt(name)(tensor), kind, name)

    def write_adapter(self, path: Path, rank: int) -> None:
        """Write U V of the layers that ``write`` has seen: one rank, alpha = rank, so llama.cpp's scale is 1."""
        fields = {
            "general.type": "adapter",
            "adapter.type": "lora",
            "adapter.lora.alpha": float(rank),
            "general.file_type": _FILE_TYPES["f32"],
        }
        writer = _writer(path, self._family.arch, fields)
        for name, (U, V) in self._factors.items():
            named = self._name(f"{name}.weight")
            _announce(writer, Entry(f"{named}.lora_a", (rank, V.shape[1]), "f32"))
            _announce(writer, Entry(f"{named}.lora_b", (len(U), rank), "f32"))
        _begin(writer)
        for U, V in self._factors.values():
            B, A = padded(U, V, rank)
            writer.write_tensor_data(A.float().contiguous().numpy())
            writer.write_tensor_data(B.float().contiguous().numpy())
        writer.close()

    def notes(self) -> list[str]:
        """What became of the layers."""
        notes = []
        if self._exact:
            notes.append(f"{self._exact} layers hold S exactly.")
        if self._rounded:
            notes.append(f"{self._rounded} layers were rounded to {self._kind}: measure the quality again.")
        if self._wide:
            notes.append(f"{self._wide} layers are in f16, because 32 does not divide their inputs.")
        return notes


def _rows(blocks: Any, order: Callable[[Tensor], Tensor]) -> Any:  # noqa: ANN401 - numpy arrays
    return order(torch.from_numpy(blocks)).contiguous().numpy()


def _fields(stored: Stored, family: Family, kind: str) -> dict[str, Any]:
    own = settings(stored.config, family)
    tokens = tokenizer_fields(stored.folder, stored.config["vocab_size"])
    return {
        "general.type": "model",
        "general.name": stored.folder.resolve().name,
        "general.file_type": _FILE_TYPES[kind],
        "general.quantization_version": 2,
        **{f"{family.arch}.{name}": value for name, value in own.items()},
        **{f"tokenizer.{name}": value for name, value in tokens.items()},
    }


def _writer(path: Path, arch: str, fields: dict[str, Any]) -> Any:  # noqa: ANN401 - gguf's
    from gguf import GGUFWriter

    writer = GGUFWriter(path, arch)
    for name, value in fields.items():
        kinds: dict[Any, Any] = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        kinds |= {str: writer.add_string, list: writer.add_array}
        kinds[type(value)](name, value)
    return writer


def _bytes(entry: Entry) -> int:
    if entry.kind in BITS:
        return prod(byte_shape(entry.shape, entry.kind))
    return prod(entry.shape) * {"f32": 4, "f16": 2}[entry.kind]


def _announce(writer: Any, entry: Entry) -> None:  # noqa: ANN401 - gguf's
    import numpy as np
    from gguf.constants import GGMLQuantizationType

    blocks = entry.kind in BITS
    shape = byte_shape(entry.shape, entry.kind) if blocks else entry.shape
    kind = np.dtype({"f32": np.float32, "f16": np.float16}.get(entry.kind, np.uint8))
    quantized = GGMLQuantizationType[_TYPES[entry.kind]] if blocks else None
    writer.add_tensor_info(entry.name, shape, kind, _bytes(entry), quantized)


def _begin(writer: Any) -> None:  # noqa: ANN401 - gguf's
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
