"""What a checkpoint has beside what is compressed: tensors that the opened class lacks, files that are no weights.

A model for several modalities may open as its text part alone, and heads that predict further tokens have no place in
most classes. Such tensors are not part of the result, which is said with names and sizes. Licences, processors and
templates of chats come along.
"""

import re
from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from sparlow.model import _transformers as private
from sparlow.model.loading.streaming import CannotStreamError, as_transformers_reads, names_in_model, stored_tensors

_SHOWN = 3  # names in a sentence
_LARGEST = 10_000_000  # bytes of a file that comes along
_COPIED = re.compile(
    r"(licen[cs]e|notice|copying|copyright|patents|use_policy|acceptable_use)([.\-_].*)?"
    r"|.*processor_config\.json|chat_template\.(json|jinja)",
    re.IGNORECASE,
)
_OF_A_HUB_ID = (  # a repository is not listed, only asked for these
    *("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md"),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("chat_template.json", "chat_template.jinja"),
)
_EXPECTED = re.compile(  # weights, their index, what is written anew, code, and what a result of sparlow has of its own
    r".*\.(safetensors|bin|pt|pth|gguf|h5|msgpack|onnx|ckpt|index\.json|py|pyc|model|tiktoken)|(generation_)?config\.json"
    r"|tokenizer.*\.json|vocab\..*|merges\.txt|special_tokens_map\.json|added_tokens\.json|readme(\..*)?|\..*"
    r"|sparlow\.json|recipe\.toml|report\.(json|html)",
    re.IGNORECASE,
)


def companions(where: str, revision: str | None = None) -> list[Path]:
    """Return the files of a directory or a hub id that come along with a compressed model, sorted by name."""
    if Path(where).is_dir():
        return [path for path in _files(where) if _COPIED.fullmatch(path.name)]
    options: dict[str, Any] = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    options |= {"_raise_exceptions_for_connection_errors": False, "_raise_exceptions_for_gated_repo": False}
    try:
        with as_transformers_reads():
            found = [private.cached_file(where, name, **options) for name in _OF_A_HUB_ID]
    except CannotStreamError:  # which is said elsewhere
        found = []
    return [Path(path) for path in found if path is not None]


def _files(where: str) -> list[Path]:
    paths = (path for path in sorted(Path(where).iterdir()) if path.is_file())
    return [path for path in paths if path.stat().st_size <= _LARGEST and path.name.isprintable()]


def left_out(model: PreTrainedModel, where: str, revision: str | None = None) -> list[str]:
    """Return a sentence each on the tensors and the files of a directory or hub id that will not be in the result.

    Args:
        model: What was opened from there, dense; it may be on the meta device.
        where: It.
        revision: Of the hub's repository.
    """
    sentences = []
    try:
        with as_transformers_reads():
            sentences += _of_tensors(_missing_tensors(model, stored_tensors(where, revision)))
    except (CannotStreamError, SafetensorError):  # a damaged file is told of where it is opened
        sentences.append("It is unknown whether the model's class lacks tensors of the checkpoint.")
    if Path(where).is_dir():
        others = [
            path.name for path in _files(where) if not (_COPIED.fullmatch(path.name) or _EXPECTED.fullmatch(path.name))
        ]
        if others:
            sentences.append(f"Files beside the model that are not copied: {_shown(others)}.")
    return sentences


def _missing_tensors(model: PreTrainedModel, files: Mapping[str, Path]) -> dict[str, int]:
    """Return the number of entries of each stored tensor that has no place in the model."""
    names = names_in_model(model, private.get_model_conversion_mapping(model), files)
    lost = [stored for stored in names if names[stored] is None and not _is_computed(model, stored)]
    sizes: dict[str, int] = {}
    for file in {files[name] for name in lost}:
        with safe_open(file, framework="pt") as shard:
            parts = {name: shard.get_slice(name) for name in lost if files[name] == file}
            # masks and positions are no parameters
            floats = {name: part for name, part in parts.items() if part.get_dtype().startswith(("F", "BF"))}
            sizes |= {name: prod(part.get_shape()) for name, part in floats.items()}
    return {name: sizes[name] for name in sorted(sizes)}


def _is_computed(model: PreTrainedModel, stored: str) -> bool:
    """Whether a tensor is a buffer that the class computes by itself, such as rotary frequencies, maybe elsewhere."""
    buffers = [name for name, _ in model.named_non_persistent_buffers()]
    last = stored.rpartition(".")[2]
    elsewhere = {name.rpartition(".")[2] for name in buffers} - {n.rpartition(".")[2] for n in model.state_dict()}
    return last in elsewhere or any(stored == name or name.endswith(f".{stored}") for name in buffers)


def _of_tensors(sizes: Mapping[str, int]) -> list[str]:
    if not sizes:
        return []
    parts: Counter[str] = Counter()
    for name, size in sizes.items():
        parts[".".join(name.split(".")[:2])] += size
    names = _shown([f"{part} ({size:,})" for part, size in parts.most_common()])
    count = f"{sum(sizes.values()):,} parameters in {len(sizes)} stored tensors"
    return [f"{count} are not part of the result, because the model's class has no place for them: {names}."]


def _shown(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
