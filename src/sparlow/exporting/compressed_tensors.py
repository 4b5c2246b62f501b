"""``compressed-tensors``: S in int4 or int8 with a scale for each group of columns, and U V as an adapter beside it."""

import importlib.util
import inspect
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from sparlow.errors import InputError
from sparlow.exporting._registry import Exported, Writer, form
from sparlow.exporting.adapter import BASE, sign
from sparlow.exporting.directory import VLLM, checkpoint_names, meta_model_of, write_plain
from sparlow.exporting.experts import require_no_experts
from sparlow.exporting.integers import Need, exact_integers, group_of, rounded_integers
from sparlow.exporting.lora import adapt, adapter_bytes, adapter_commands, require_adapter
from sparlow.exporting.stored import Layer, Stored
from sparlow.progress import Notify
from sparlow.schema import Doc

METHOD = "compressed-tensors"
_WORD = 32  # bits that codes are packed into
_KERNELS = (32, 64, 128)  # columns a scale for which vLLM has kernels, beside a whole row
Rounding = Annotated[
    Literal["no", "int8", "int4"],
    Doc(
        "Round values that other programs cannot store exactly. int8 keeps the half levels of int4, in twice the bytes."
    ),
]


@form(
    "compressed-tensors",
    keeps="codes and scales of levels `integer` exactly, the small size, U and V",
    loses="the mask (a zero takes as many bits as any value), other levels, embedding and head in few bits",
    opened_by=("transformers with compressed-tensors and PEFT", "vLLM", "SGLang"),
)
def compressed_tensors(stored: Stored, *, round: Rounding = "no") -> Writer:  # noqa: A002 - as typed
    """S in int4 or int8 in groups of columns, its zeros among the levels, and U V as an adapter beside it."""
    require_no_experts(stored, meta_model_of(stored), "compressed-tensors")
    bits = {name: _bits(stored, name, round) for name in stored.layers}
    rank = require_adapter(stored, stored.ranks) if stored.ranks else 0
    group = _common_group(stored)
    dense = [name for name, module in meta_model_of(stored).named_modules() if isinstance(module, nn.Linear)]
    config = _quantization(bits, group, [name for name in dense if name not in bits])
    names = checkpoint_names(stored)
    parts: dict[str, tuple[Tensor, Tensor]] = {}
    rounded: list[str] = []

    def packed(layer: Layer) -> dict[str, Tensor]:
        if layer.rank:
            parts[layer.name] = layer.U, layer.V
        need = Need.of(stored.layers[layer.name].scheme.grid).bits
        if need is None or need > bits[layer.name]:
            rounded.append(layer.name)
        return _packed(layer, bits[layer.name], group or layer.S.shape[1], exact=layer.name not in rounded)

    def write(folder: Path, notify: Notify) -> Exported:
        shards = write_plain(stored, folder / BASE if rank else folder, packed, names, notify, config)
        found = Exported(METHOD, folder)
        if rank:
            adapt(stored, folder, parts)
            sign(folder, stored.fingerprint, shards)
        plain = ['transformers: AutoModelForCausalLM.from_pretrained("OUT")', f"vLLM: {VLLM} OUT"]
        by_hand = "transformers + PEFT: "  # which needs an option of transformers beside
        found.commands = [line for line in adapter_commands(rank) if by_hand not in line] if rank else plain
        found.notes = _notes(bits, group, rounded, stored)
        return found

    return Writer(write, _bytes(stored, bits, group) + (adapter_bytes(stored, rank) if rank else 0))


def _common_group(stored: Stored) -> int | None:
    """Return the columns that share a scale in all layers; None for whole rows.

    One for all, though some layers could do with fewer scales: with several, transformers 5.23 opens the layers in
    floats by the first of them.
    """
    grids = {name: record.scheme.grid for name, record in stored.layers.items()}
    if all(grid is not None and grid.group is None for grid in grids.values()):
        return None
    return math.gcd(*(group_of(grid, stored.shape(name)[1]) for name, grid in grids.items()))


def _bytes(stored: Stored, bits: Mapping[str, int], group: int | None) -> int:
    """Return the bytes of the base."""
    total = 0
    for name, dense in stored.dense_bytes.items():
        layer = name.removesuffix(".weight")
        if layer not in bits:
            total += dense
            continue
        (out, columns), size = stored.shape(layer), stored.layers[layer].scheme.dtype.itemsize
        total += out * (-(-columns * bits[layer] // _WORD) * (_WORD // 8) + columns // (group or columns) * size)
        total += 2 * torch.int64.itemsize  # the shape
    return total


def _bits(stored: Stored, name: str, rounding: str) -> int:
    """Return the bits in which a layer is stored.

    Raises:
        InputError: Its values cannot be stored exactly, and may not be rounded.
    """
    scheme = stored.layers[name].scheme
    if scheme.transposed:
        raise InputError(
            f"{name} is stored as (in, out) by the model's class, and compressed-tensors knows linear layers only. "
            "Export merged."
        )
    if rounding != "no":
        return int(rounding.removeprefix("int"))
    own, need = (scheme.grid.bits if scheme.grid else 16), Need.of(scheme.grid).bits
    if need is not None and need <= max(own, 4):
        return need
    if scheme.grid is None:
        raise InputError(
            f"The values of {name} are {scheme.values}, on no grid that could be stored in few bits. Compress with "
            "--values int4 --levels integer, or add --option round=int8."
        )
    raise InputError(
        f"The values of {name} are {scheme.values} with the levels {scheme.grid.levels}, and other programs know whole "
        "levels only. Compress with --levels integer, or add --option round=int8 (twice the bytes, and half levels of "
        "int4 stay exact)."
    )


def _packed(layer: Layer, bits: int, group: int, *, exact: bool) -> dict[str, Tensor]:
    dtype = layer.S.dtype
    found = exact_integers(layer, group) if exact else rounded_integers(layer.S, bits, group, dtype)
    scale = found.scale.to(dtype)
    if exact and not torch.equal((found.codes * scale.repeat_interleave(group, 1)).to(dtype), layer.S):
        raise InputError(f"The scales of {layer.name} cannot be stored in {dtype}. Export lora or merged.")
    return {
        "weight_packed": pack_words(found.codes, bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor(layer.S.shape, dtype=torch.int64),
    }


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Return codes (out, in) int8 of 4 or 8 bits in words of 32 (out, ⌈in · bits / 32⌉), the first one lowest.

    A code c is stored as c + 2^(bits−1); what a row leaves over is 0.
    """
    each = _WORD // bits
    shifted = nn.functional.pad(codes.to(torch.int32) + (1 << (bits - 1)), (0, -codes.shape[1] % each))
    parts = shifted.view(len(codes), -1, each) << (bits * torch.arange(each, dtype=torch.int32))
    return parts.sum(2, dtype=torch.int32)


def _quantization(bits: Mapping[str, int], group: int | None, dense: list[str]) -> dict[str, Any]:
    """Return ``quantization_config``: layers stored alike share a group; what stays dense is named."""
    alike: dict[int, list[str]] = {}
    for name, size in bits.items():
        alike.setdefault(size, []).append(name)
    sections = {
        f"group_{i}": {
            "targets": ["Linear"] if len(alike) == 1 else _targets(names, bits),
            "weights": {
                "num_bits": size,
                "type": "int",
                "symmetric": True,
                "strategy": "channel" if group is None else "group",
                "group_size": group,
                "dynamic": False,
                "observer": "minmax",
            },
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
        for i, (size, names) in enumerate(alike.items())
    }
    return {
        "quant_method": METHOD,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": sections,
        "ignore": dense,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _targets(names: list[str], every: Mapping[str, int]) -> list[str]:
    """Return what names these layers and no others: their ends where these are theirs alone, else all of them."""
    ends = {name.rpartition(".")[2] for name in names}
    others = {name.rpartition(".")[2] for name in every if name not in names}
    return sorted(names) if ends & others else [f"re:.*\\.{re.escape(end)}$" for end in sorted(ends)]


def as_floats(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of ``from_pretrained`` by which a model of this form opens as PEFT needs it, in floats.

    Raises:
        InputError: The package compressed-tensors is missing.
    """
    if (config.get("quantization_config") or {}).get("quant_method") != METHOD:
        return {}
    if importlib.util.find_spec("compressed_tensors") is None:
        raise InputError("The base needs the package compressed-tensors. Run: pip install compressed-tensors")
    from transformers import CompressedTensorsConfig

    new = "dequantize" in inspect.signature(CompressedTensorsConfig).parameters
    untyped: Any = CompressedTensorsConfig
    return {"quantization_config": untyped(dequantize=True) if new else untyped(run_compressed=False)}


def _notes(bits: Mapping[str, int], group: int | None, rounded: list[str], stored: Stored) -> list[str]:
    sizes = ", ".join(f"{list(bits.values()).count(size)} layers in int{size}" for size in sorted({*bits.values()}))
    notes = [f"S: {sizes}."]
    if rounded:
        notes.append(f"{len(rounded)} layers were rounded to nearest, such as {rounded[0]}: measure the quality again.")
    if len({*bits.values()}) > 1:
        notes.append(
            "With layers in several sizes, transformers cannot open the base for PEFT; vLLM can. Or export lora."
        )
    if group and group not in _KERNELS:
        notes.append(f"Scales for {group} columns have no kernels in vLLM; transformers opens them.")
    if len(stored.records) > len(stored.layers):
        notes.append("The embedding or the output head was in few bits, and is stored in the model's type here.")
    return notes
