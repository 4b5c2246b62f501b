"""``lora``: plain S, and U V as a LoRA adapter on it."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from sparlow.errors import InputError
from sparlow.exporting._registry import Exported, Writer, form
from sparlow.exporting.adapter import BASE, common_rank, sign, write_adapter
from sparlow.exporting.directory import VLLM, checkpoint_names, meta_model_of, write_plain
from sparlow.exporting.experts import require_no_experts
from sparlow.exporting.stored import Layer, Stored
from sparlow.progress import Notify


@form(
    "lora",
    keeps="S, U and V bit for bit, S's zeros included",
    loses="the small size: S is stored dense",
    opened_by=("transformers with PEFT", "vLLM", "SGLang", "llama.cpp's converters"),
)
def lora(stored: Stored) -> Writer:
    """Plain S in base, and U V as an adapter of one rank for all layers, to go on training or to serve."""
    rank, names = require_base_and_adapter(stored, stored.ranks), checkpoint_names(stored)
    parts: dict[str, tuple[Tensor, Tensor]] = {}

    def plain(layer: Layer) -> dict[str, Tensor]:
        if layer.rank:
            parts[layer.name] = layer.U, layer.V
        return {"weight": layer.as_stored(layer.S)}

    def write(folder: Path, notify: Notify) -> Exported:
        shards = write_plain(stored, folder / BASE, plain, names, notify)
        adapt(stored, folder, parts)
        sign(folder, stored.fingerprint, shards)
        found = Exported("lora", folder)
        found.notes.append(f"The adapter has the rank {rank} in all layers; the layers' own ranks are {own(stored)}.")
        found.commands = adapter_commands(rank)
        return found

    return Writer(write, sum(stored.dense_bytes.values()) + adapter_bytes(stored, rank))


def require_base_and_adapter(stored: Stored, ranks: Mapping[str, int], instead: str = "Export merged.") -> int:
    """Return the rank of the adapter; InputError if there can be none, or no plain base.

    Args:
        stored: The model.
        ranks: Of the layers that get an adapter, by name.
        instead: What else can be done, for the error.
    """
    require_no_experts(stored, meta_model_of(stored, instead), "an adapter", instead)
    return require_adapter(stored, ranks, instead)


def require_adapter(stored: Stored, ranks: Mapping[str, int], instead: str = "Export merged.") -> int:
    """Return the rank of the adapter; InputError if there can be none. See ``require_base_and_adapter``."""
    if not ranks:
        raise InputError(f"No layer has a low-rank part, so there is nothing to put into an adapter. {instead}")
    if len({stored.layers[name].scheme.transposed for name in ranks}) > 1:
        raise InputError(
            "Some layers of this model are stored as (in, out) and others as (out, in), and an adapter knows one order "
            f"only. {instead}"
        )
    return common_rank(ranks.values(), instead)


def adapt(stored: Stored, folder: Path, parts: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Write the adapter of a stored model."""
    transposed = any(stored.layers[name].scheme.transposed for name in parts)  # then all are
    write_adapter(folder, parts, stored.modules(), transposed=transposed)


def adapter_bytes(stored: Stored, rank: int, itemsize: int | None = None) -> int:
    """Return the bytes of the adapter; U and V have the type of S unless one of so many bytes is given."""
    sizes = ((sum(stored.shape(name)), stored.layers[name].scheme.dtype.itemsize) for name in stored.ranks)
    return sum(rank * size * (itemsize or own) for size, own in sizes)


def own(stored: Stored) -> str:
    """Return the ranks of a stored model as text."""
    ranks = sorted({record.scheme.rank for record in stored.layers.values()})
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"


def adapter_commands(rank: int) -> list[str]:
    """Return how a base with an adapter is opened elsewhere."""
    return [
        'transformers + PEFT, checksums compared: sparlow.open_adapter("OUT")',
        'transformers + PEFT: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("OUT/base"), "OUT")',
        f"vLLM: {VLLM} OUT/base --enable-lora --max-lora-rank {rank} --lora-modules compressed=OUT",
        "SGLang: python -m sglang.launch_server --model-path OUT/base --lora-paths compressed=OUT",
    ]
