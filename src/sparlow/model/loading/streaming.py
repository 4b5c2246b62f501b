"""A model whose weights stay on disk: a model on the meta device, into which one part at a time is read.

transformers' own loader reads a part, so renamed, merged and split tensors come out as ``from_pretrained`` gives them.
"""

import copy
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from sparlow.files import INDEX, SINGLE
from sparlow.machine import computing_dtype
from sparlow.model import _transformers as private
from sparlow.model.forward.decoder import Decoder, shared_weights
from sparlow.model.loading.weights import to_compute

CHUNK = 2**22  # bytes read ahead at a time


class CannotStreamError(Exception):
    """The weights of this model cannot be read block by block; the text says why."""


@contextmanager
def as_transformers_reads() -> Iterator[None]:
    """Catch errors of code that uses private parts of transformers, which another release may have changed.

    Raises:
        CannotStreamError: A name is missing, or what has it behaves in another way.
    """
    if private.NO_STREAMING:
        raise CannotStreamError(private.NO_STREAMING)
    try:
        yield
    except (AttributeError, TypeError) as problem:  # what a call with other arguments or a renamed member ends in
        raise CannotStreamError(f"transformers {private.VERSION} read them in another way: {problem}") from problem


class OnDisk:
    """The parts of a model on disk, see ``weights.Weights``.

    Args:
        meta_model: What ``from_pretrained`` opens on the meta device; its buffers that are not stored come to life.
        files: The file of each stored tensor.
        device: Where parts are put.

    Raises:
        CannotStreamError: A tensor belongs to more than one block, or to none that can be told.
    """

    def __init__(self, meta_model: PreTrainedModel, files: Mapping[str, Path], device: torch.device) -> None:
        self.device = device
        self.computing = computing_dtype(meta_model.dtype, device)
        widened = self.computing != meta_model.dtype
        self._model = meta_model
        self._decoder = Decoder.of(meta_model)
        self._blocks = self._decoder.blocks
        if shared_weights(meta_model, self._decoder):
            raise CannotStreamError("a weight of a decoder block is shared")
        self._mapping = private.get_model_conversion_mapping(meta_model)
        self._files = self._by_part(files)
        self._config = private.LoadStateDictConfig(
            dtype=meta_model.dtype,
            device_map={"": device},
            weight_mapping=self._mapping,  # a list of the two kinds' base class
        )
        self._stored = {name: tensor.dtype for name, tensor in meta_model.state_dict().items()}
        _fill_buffers(meta_model)
        for name, buffer in list(meta_model.named_non_persistent_buffers()):
            wide = self.computing if widened and buffer.is_floating_point() else None
            setattr(meta_model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], buffer.to(device, wide))

    def states(self) -> Iterator[dict[str, Tensor]]:
        """Yield the tensors of every part as stored, tied ones as the same object, the rest first."""
        self._read(None)
        yield {k: t for k, t in self._model.state_dict(keep_vars=True).items() if self._number(k) is None}
        self._release_rest()
        for i in range(len(self._blocks)):
            with self._loaded(i) as block:
                yield {self._decoder.layer_name(i, k): t for k, t in block.state_dict(keep_vars=True).items()}

    @contextmanager
    def outside_blocks(self, *, stored: bool = False) -> Iterator[None]:
        """See ``Weights``."""
        self._read(None)
        for _, module in () if stored or self.computing != torch.float32 else self._outside():
            for p in module.parameters(recurse=False):
                p.data = p.data.float()  # not a new one: it may be tied
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_floating_point():
                    setattr(module, name, buffer.float())
        try:
            yield
        finally:
            self._release_rest()

    @contextmanager
    def block(self, i: int, *, load: bool = True) -> Iterator[nn.Module]:
        """See ``Weights``."""
        if not load:
            with self._in_place(i) as block:
                yield block
            return
        with self._loaded(i) as block:
            if i + 1 < len(self._blocks):  # by the time it is asked for, the system has it in memory
                _begin_to_read(self._files[i + 1])
            yield to_compute(block, self)

    @contextmanager
    def _loaded(self, i: int) -> Iterator[nn.Module]:
        with self._in_place(i) as block:
            self._read(i)
            yield block

    @contextmanager
    def _in_place(self, i: int) -> Iterator[nn.Module]:
        """Replace block i by a copy for the time inside. The block itself stays without weights."""
        kept = self._blocks[i]
        self._blocks[i] = copy.deepcopy(kept)
        try:
            yield self._blocks[i]
        finally:
            self._blocks[i] = kept

    def _number(self, name: str) -> int | None:
        """The block that a tensor of the model is in."""
        inside = self._decoder.holds(name)
        return int(name.removeprefix(f"{self._decoder.name}.").split(".")[0]) if inside else None

    def _by_part(self, files: Mapping[str, Path]) -> dict[int | None, dict[str, Path]]:
        """Sort the stored tensors by where transformers puts them."""
        found: dict[int | None, dict[str, Path]] = {part: {} for part in (None, *range(len(self._blocks)))}
        for stored, name in names_in_model(self._model, self._mapping, files).items():
            if name is not None:
                found[self._number(name)][stored] = files[stored]
        return found

    def _read(self, part: int | None) -> None:
        """Read one part of the checkpoint into the model, in the types it is stored in."""
        names = self._files[part]
        with ExitStack() as stack:
            stack.enter_context(_without_bars())
            stack.enter_context(private.raising_out_of_memory())
            handles = {file: stack.enter_context(safe_open(file, framework="pt")) for file in set(names.values())}
            state = {name: handles[file].get_slice(name) for name, file in names.items()}
            info, _ = private.convert_and_load_state_dict_in_model(self._model, state, self._config)
        missing = {name for name in info.missing_keys if self._number(name) == part}
        if part is None:
            self._model.tie_weights(missing_keys=missing, recompute_mapping=False)
        problems = [*missing, *(name for name, *_ in info.mismatched_keys), *info.conversion_errors]
        if problems:
            raise CannotStreamError(f"{min(problems)} cannot be read by itself")

    def _release_rest(self) -> None:
        empty: dict[int, Tensor] = {}  # what is tied stays tied

        def emptied(name: str, tensor: Tensor) -> Tensor:
            if id(tensor) not in empty:
                bare = torch.empty_like(tensor, dtype=self._stored[name], device="meta")
                empty[id(tensor)] = nn.Parameter(bare, tensor.requires_grad) if _is_parameter(tensor) else bare
            return empty[id(tensor)]

        for module_name, module in self._outside():
            for own in (module._parameters, module._buffers):  # noqa: SLF001 - the only place of both
                for name, tensor in own.items():
                    full = f"{module_name}.{name}".lstrip(".")
                    if tensor is not None and full in self._stored:  # other buffers are not in the files
                        own[name] = emptied(full, tensor)  # type: ignore[assignment]

    def _outside(self) -> Iterator[tuple[str, nn.Module]]:
        """All modules outside of the blocks."""
        return ((name, m) for name, m in self._model.named_modules() if self._number(name) is None)


def names_in_model(model: PreTrainedModel, mapping: Iterable[Any], stored: Iterable[str]) -> dict[str, str | None]:
    """Return where transformers puts each stored tensor; None where the model has no place for it.

    Args:
        model: It may be on the meta device.
        mapping: Between names in files and in memory, see ``get_model_conversion_mapping``.
        stored: Names in the files.
    """
    entries = list(mapping)
    renamings = [entry for entry in entries if isinstance(entry, private.WeightRenaming)]
    converters = [entry for entry in entries if isinstance(entry, private.WeightConverter)]
    expected, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, str | None] = {}
    for given in stored:
        name, _ = private.rename_source_key(given, renamings, converters, prefix, expected)
        if name not in expected and given in expected:  # as transformers decides it
            name, _ = private.rename_source_key(given, [], [], prefix, expected)
        found[given] = name if name in expected else None
    return found


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)


def _fill_buffers(model: PreTrainedModel) -> None:
    """Compute the buffers that are not stored, such as rotary frequencies, as ``from_pretrained`` does.

    Some are computed by a module around the one that holds them. What the initialisation leaves as it was would be
    whatever lay in memory: so it is done twice, and over two different contents the results must agree.

    Raises:
        CannotStreamError: Nothing initialises a buffer.
    """
    names = [name for name, _ in model.named_non_persistent_buffers()]
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in names}
    ways = [name.split(".") for name in names]
    around = {".".join(way[:i]) for way in ways for i in range(len(way))}
    for name, module in model.named_modules():
        vars(module)["_is_hf_initialized"] = name not in around  # transformers' mark
    results: list[dict[str, Tensor]] = []
    for content in (1, 0):
        for name, buffer in list(model.named_non_persistent_buffers()):
            setattr(owners[name], name.rpartition(".")[2], torch.full_like(buffer, content, device="cpu"))
        for name in around:
            vars(model.get_submodule(name))["_is_hf_initialized"] = False
        model.initialize_weights()
        results.append(dict(model.named_non_persistent_buffers()))
    for name in names:
        if not torch.equal(results[0][name], results[1][name]):
            raise CannotStreamError(f"nothing initialises the buffer {name}")


def stored_tensors(where: str, revision: str | None) -> dict[str, Path]:
    """Return the file of each tensor of a directory or of a hub id, which is downloaded if need be.

    Raises:
        CannotStreamError: There are no safetensors files under their usual names.
    """
    options: dict[str, Any] = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    single = private.cached_file(where, SINGLE, **options)
    if single is not None:
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), Path(single))
    index = private.cached_file(where, INDEX, **options)
    if index is None:
        raise CannotStreamError(f"there is neither {SINGLE} nor {INDEX}")
    files, about = private.get_checkpoint_shard_files(where, index, revision=revision)
    by_name = {Path(file).name: Path(file) for file in files}
    return {name: by_name[Path(file).name] for name, file in about["weight_map"].items()}


def _begin_to_read(files: Mapping[str, Path]) -> None:
    """Let a thread read ahead; where none can be started, nothing is lost but time."""
    with suppress(RuntimeError):  # as Python says that there is no memory for one
        Thread(target=_read_ahead, args=(files,), daemon=True).start()


def _read_ahead(files: Mapping[str, Path]) -> None:
    """Let the system read the bytes of some tensors into its cache; nothing is kept here.

    Whatever hinders that is told of where the block itself is read.
    """
    with suppress(OSError, MemoryError, ValueError, LookupError):
        _read_all(files)


def _read_all(files: Mapping[str, Path]) -> None:
    for path in set(files.values()):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
            spans = [header[name]["data_offsets"] for name, where in files.items() if where == path]
            for start, end in sorted(spans):
                file.seek(8 + size + start)
                for done in range(start, end, CHUNK):
                    file.read(min(CHUNK, end - done))


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep transformers from showing a progress bar for each block."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
