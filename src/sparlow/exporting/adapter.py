"""U V as a LoRA adapter in PEFT's form, right in every reader: one rank, alpha = rank, and no pattern.

PEFT computes W x + (alpha / r) B A x, with a rank and an alpha for each layer. vLLM and MLX read one r and one alpha,
and llama.cpp divides one alpha by the rank of each tensor. With one rank for all layers and alpha = r each of them gets
the scale 1. Ranks are filled up with zeros to the next one that vLLM has kernels for.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor

from sparlow.errors import InputError
from sparlow.files import CONFIG, read_json, replacing, sha256, shard_filename, write_json
from sparlow.model.artefact.shards import ShardRecord

if TYPE_CHECKING:
    from peft import PeftModel

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # for which vLLM has kernels; it refuses others
ORIGIN = "sparlow-adapter.json"  # beside the adapter: the run it comes from, and the shards of the base it belongs to
BASE = "base"  # folder of the base inside that of the adapter
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # PEFT's, of every name


def common_rank(ranks: Iterable[int], instead: str = "Export merged.") -> int:
    """Return the rank that adapters of these ranks are filled up to.

    Args:
        ranks: Of the layers.
        instead: What else can be done, for the error.

    Raises:
        InputError: No reader but PEFT takes so large a rank.
    """
    largest = max(ranks)
    found = next((rank for rank in RANKS if rank >= largest), None)
    if found is None:
        raise InputError(f"The largest rank is {largest}, and servers take adapters of {RANKS[-1]} at most. {instead}")
    return found


def padded(U: Tensor, V: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return U (out, rank) and V (rank, in) with columns and rows of zeros added; U V stays what it is."""
    wide, tall = U.new_zeros(len(U), rank), V.new_zeros(rank, V.shape[1])
    wide[:, : U.shape[1]], tall[: len(V)] = U, V
    return wide, tall


def write_adapter(
    folder: Path,
    parts: Mapping[str, tuple[Tensor, Tensor]],
    modules: Iterable[str],
    *,
    transposed: bool = False,
) -> int:
    """Write an adapter; return its rank.

    Args:
        folder: Of the adapter; the base is in ``base`` inside.
        parts: U (out, rank) and V (rank, in) by the layer's name, in the type they are to be stored in.
        modules: Names of all modules of the model that have weights.
        transposed: Whether the model's class stores these weights as (in, out).

    Raises:
        RunError: It cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rank = common_rank(len(V) for _, V in parts.values())
    tensors: dict[str, Tensor] = {}
    for name, (U, V) in parts.items():
        B, A = padded(U.detach().cpu(), V.detach().cpu(), rank)
        tensors |= {f"{_PREFIX}{name}.lora_A.weight": A, f"{_PREFIX}{name}.lora_B.weight": B}
    with replacing(folder / _WEIGHTS) as partial:
        save_file(tensors, partial, {"format": "pt"})
    write_json(folder / _CONFIG, _config(rank, targets(parts, modules), transposed=transposed), indent=2)
    return rank


def _config(rank: int, names: list[str], *, transposed: bool) -> dict[str, Any]:
    """Return adapter_config.json. The path of the base is relative, and none that could be the id of a hub."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": f"./{BASE}",
        "revision": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "target_modules": names,
        "modules_to_save": None,
        "init_lora_weights": True,
    }


def targets(adapted: Iterable[str], modules: Iterable[str]) -> list[str]:
    """Return the names of modules as ``target_modules`` has them: their ends, unless others end alike."""
    adapted = set(adapted)
    ends = {name.rpartition(".")[2] for name in adapted}
    others = {name.rpartition(".")[2] for name in modules if name not in adapted}
    return sorted(ends) if not ends & others else sorted(adapted)


def sign(folder: Path, run: Mapping[str, Any], base: Iterable[ShardRecord]) -> None:
    """Record in the adapter's folder which run it comes from and which base it belongs to."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = {shard.file: {"bytes": shard.bytes, "sha256": shard.sha256} for shard in base}
    write_json(folder / ORIGIN, {"run": run, "base": shards})


def require_its_base(folder: Path, base: Path) -> None:
    """See that a base is the one that an adapter was made with: on another one it would compute something else.

    Raises:
        InputError: It is not, or nothing says what it should be.
    """
    recorded = read_json(folder / ORIGIN).get("base")
    if not isinstance(recorded, dict) or not recorded:
        raise InputError(f"{folder / ORIGIN} does not say which base the adapter belongs to. Export it again.")
    for name, expected in recorded.items():
        file = base / shard_filename(name)
        if not file.is_file():
            raise InputError(f"{file} is missing, so {base} is not the base of this adapter. Give its own.")
        if {"bytes": file.stat().st_size, "sha256": sha256(file)} != expected:
            raise InputError(f"{file} is not the file that the adapter was made with. Give the adapter's own base.")


def open_adapter(folder: str | Path, base: str | Path | None = None, **options: Any) -> "PeftModel":  # noqa: ANN401 - of from_pretrained
    """Open a base and its adapter with PEFT, after comparing the checksums of the base with those on record.

    Args:
        folder: Of the adapter, as ``sparlow export --as lora`` or ``sparlow finetune --peft`` wrote it.
        base: Its base, where it is not in ``base`` inside.
        options: Of ``from_pretrained`` of the base, such as dtype and device_map.

    Raises:
        InputError: The base is another one, or PEFT is missing.
    """
    place, beside = Path(folder), Path(base) if base is not None else Path(folder) / BASE
    require_its_base(place, beside)
    try:
        from peft import PeftModel
    except ImportError as problem:
        raise InputError("Adapters need the package peft. Run: pip install 'sparlow[finetune]'") from problem
    from transformers import AutoModelForCausalLM

    from sparlow.exporting.compressed_tensors import as_floats  # above this file

    untyped: Any = AutoModelForCausalLM
    given = {**as_floats(read_json(beside / CONFIG)), **options}
    found: PeftModel = PeftModel.from_pretrained(untyped.from_pretrained(beside, **given), str(place))
    return found
