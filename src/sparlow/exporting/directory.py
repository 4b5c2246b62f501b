"""A directory that transformers opens without sparlow: shards, index, config, and the files that belong to any form."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sparlow.errors import InputError, as_input_error
from sparlow.exporting.experts import fused
from sparlow.exporting.stored import Layer, Stored
from sparlow.files import CONFIG, INDEX, replacing, write_json
from sparlow.model import _transformers as private
from sparlow.model.artefact.loader import LOADER, remote_code_left
from sparlow.model.artefact.shards import ShardRecord, write_shard
from sparlow.progress import Notify, counting

STAGE = "exporting shards"
VLLM = "python -m vllm.entrypoints.openai.api_server --model"  # the server that was tried, before the directory
_OURS = re.compile(  # what is of one form only; all else beside the weights travels along
    r".*\.(safetensors|bin|pt|pth|gguf|h5|msgpack|onnx|ckpt|index\.json)|config\.json|sparlow.*\.json|recipe\.toml"
    r"|report\.(json|html)|readme(\..*)?|adapter_.*|\..*",
    re.IGNORECASE,
)
_CODE = (".py", ".pyc")
_BY_HAND = 'Open it with sparlow.load(DIR, mode="merged", trust_remote_code=True) and save_pretrained.'


Names = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def write_plain(
    stored: Stored,
    folder: Path,
    tensors: Callable[[Layer], Mapping[str, Tensor]],
    renamed: Names,
    notify: Notify,
    quantization: Mapping[str, Any] | None = None,
) -> list[ShardRecord]:
    """Write a directory that transformers opens; never more than a shard is in memory.

    Args:
        stored: The model.
        folder: Where to; made if need be.
        tensors: What a compressed layer becomes, by the last part of the names; its bias is added.
        renamed: What ``checkpoint_names`` gives.
        notify: Called after each shard.
        quantization: ``quantization_config`` of another method, if there is one.

    Raises:
        RunError: It cannot be written.
        InputError: A weight is damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    advance = counting(notify, STAGE, len(stored.files))
    records: list[ShardRecord] = []
    where: dict[str, str] = {}
    for i, shard in enumerate(stored.shards()):
        state = dict(shard.others)
        for layer in shard.layers:
            state |= {f"{layer.name}.{part}": tensor for part, tensor in tensors(layer).items()}
            state |= {} if layer.bias is None else {f"{layer.name}.bias": layer.bias}
        state = renamed(state)
        record = write_shard(folder / f"model-{i + 1:05d}-of-{len(stored.files):05d}.safetensors", state)
        where |= dict.fromkeys(state, record.file)
        records.append(record)
        advance(1)
    index = {"metadata": {"total_size": sum(record.bytes for record in records)}, "weight_map": where}
    with replacing(folder / INDEX) as partial:
        partial.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")
    copy_companions(stored, folder)
    _write_config(stored, folder, quantization)
    return records


def copy_companions(stored: Stored, folder: Path) -> None:
    """Copy tokenizer, chat template, generation config, processors, licences and the model's own code."""
    for file in sorted(stored.folder.iterdir()):
        code = file.suffix in _CODE and (file.name == LOADER or "auto_map" not in stored.config)
        if file.is_file() and not _OURS.fullmatch(file.name) and not code:
            with replacing(folder / file.name) as partial:
                shutil.copyfile(file, partial)


def _write_config(stored: Stored, folder: Path, quantization: Mapping[str, Any] | None) -> None:
    config = with_older_names(remote_code_left(stored.config))
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    write_json(folder / CONFIG, config, indent=2)


def with_older_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with the settings of its rotary embedding under the names before transformers 5 too.

    transformers 5 writes them as ``rope_parameters``. Programs that do not know this take their own default instead,
    without a word: mlx-lm does, for most families. Those that know both prefer ``rope_parameters``, or find the same.
    """
    found = {key: with_older_names(value) if isinstance(value, dict) else value for key, value in config.items()}
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in rope:  # another one for each kind of layer: had no older name
        return found
    older = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    scaling = {key: value for key, value in rope.items() if key not in older}
    if scaling.get("rope_type", "default") != "default":
        older["rope_scaling"] = scaling
    return found | {key: value for key, value in older.items() if found.get(key) is None}


def checkpoint_names(stored: Stored) -> Names:
    """Return a function that gives tensors the names, and the form, of the model's published checkpoints.

    A directory of sparlow has the names in memory. They are the same for most families; where they are not, only
    transformers reads both.

    Raises:
        InputError: The model's class is not known.
    """
    model = meta_model_of(stored)
    if not private.get_model_conversion_mapping(model, add_legacy=False):
        return lambda state: fused(model, state)
    return lambda state: private.revert_weight_conversion(model, fused(model, state))


def meta_model_of(stored: Stored, instead: str = _BY_HAND) -> PreTrainedModel:
    """Return the dense model without weights.

    Args:
        stored: The model.
        instead: What else can be done, for the error.

    Raises:
        InputError: It brings code of its own, or its class is not known.
    """
    untyped: Any = AutoModelForCausalLM
    if "auto_map" in remote_code_left(stored.config):
        raise InputError(f"{stored.folder} brings Python code of its own, which export does not run. {instead}")
    with as_input_error(f"Cannot open the config of {stored.folder}"):
        config = AutoConfig.from_pretrained(stored.folder)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            model: PreTrainedModel = untyped.from_config(config)
    return model
