"""The artefact: a directory that transformers opens, with one packed shard a decoder block.

Shard i + 1 holds block i, the last one everything outside of the blocks. ``config.json`` comes into being when all
the rest is there, so a directory without it is an unfinished one. Importing this module registers the format with
transformers: ``AutoModelForCausalLM.from_pretrained(folder)`` is enough to open it.
"""

import copy
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from sparlow.errors import InputError, RunError, as_input_error, is_out_of_memory, reason
from sparlow.files import CONFIG, INDEX, RECORD, follow_umask, read_json, replacing, sync_folder
from sparlow.machine import garbage_waits
from sparlow.model import _transformers as private
from sparlow.model.artefact.checksums import require_recorded, require_sane
from sparlow.model.artefact.dtypes import StoredDtypes
from sparlow.model.artefact.embedding import restored
from sparlow.model.artefact.hf_quantizer import SparlowConfig, transposed_layers
from sparlow.model.artefact.layers import compressed_layers, install
from sparlow.model.artefact.loader import write_loader
from sparlow.model.artefact.opening import Dense, Opening, use
from sparlow.model.artefact.packing import packed_state, stored_layer, tell_lost
from sparlow.model.artefact.schemes import METHOD
from sparlow.model.artefact.shards import (
    Header,
    ShardRecord,
    by_layer,
    check_parts,
    layer_records,
    read_headers,
    read_index,
    read_layers,
    write_shard,
)
from sparlow.model.artefact.stored_form import PackedWeight, take_packed
from sparlow.model.forward.decoder import Decoder, require_own_weights
from sparlow.model.loading.place import require_place, require_result
from sparlow.model.loading.source import require_no_kernel
from sparlow.model.loading.weights import Weights, to_compute


class CheckpointWriter:
    """Writes a compressed model, one block at a time, in any order and over several runs.

    Args:
        folder: Made if need be.
        model: The whole model; its blocks may be on the meta device.
        decoder: Its blocks.
        storage: Types of the stored weights, where the model computes in another; its own if left out.
        computed: Type it computes in; its own if left out.
        keep_grid: Refuse to write weights that are not on their grid any more; else they are stored in floats, with a
            warning.

    Raises:
        InputError: The model shares weights between blocks, or the folder cannot be made.
    """

    def __init__(
        self,
        folder: str | Path,
        model: PreTrainedModel,
        decoder: Decoder,
        *,
        storage: StoredDtypes | None = None,
        computed: torch.dtype | None = None,
        keep_grid: bool = False,
    ) -> None:
        self._folder, self._decoder, self._keep_grid = Path(folder), decoder, keep_grid
        self._lost: list[str] = []  # names of what is not on its grid any more
        self._computed, self._storage = computed or model.dtype, storage or StoredDtypes.of(model)
        self._tied = dict(model.all_tied_weights_keys)
        require_own_weights(model, decoder)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise InputError(f"Cannot create {folder}: {reason(problem)}. Choose another --out.") from problem

    def write_block(self, i: int, block: nn.Module) -> ShardRecord:
        """Write block i with its compressed layers; the file is either whole or not there.

        Raises:
            RunError: It cannot be written.
        """
        label = self._decoder.layer_name(i, "")
        lost: list[str] = []
        own, inside = packed_state(block, wanted=lambda name: self._of_layer(label + name), told=lost)
        self._lost += [label + name for name in lost]
        state = {label + name: tensor for name, tensor in own.items()}
        return self._write(i, state, {label + name: packed for name, packed in inside.items()})

    def write_rest(self, model: PreTrainedModel) -> ShardRecord:
        """Write every tensor outside of the blocks, tied ones once; the file is either whole or not there.

        Raises:
            RunError: It cannot be written.
        """
        state, packs = packed_state(model, without=self._decoder.name, wanted=self._of_layer, told=self._lost)
        for target, source in self._tied.items():
            if target in state and source in state and state[target].data_ptr() == state[source].data_ptr():
                del state[target]
        return self._write(len(self._decoder), state, packs)

    def _of_layer(self, name: str) -> torch.dtype:
        return self._storage.of_layer(name)

    def _write(self, i: int, state: dict[str, Tensor], packs: Mapping[str, PackedWeight]) -> ShardRecord:
        """Write a shard; tensors in the type of the computation are cast to their stored type."""
        if self._keep_grid:
            tell_lost(self._lost, keep=True)
        as_they_are = {f"{name}.{part}" for name in packs for part in ("scale", "book", "U_scale", "V_scale")}
        state = {
            name: t.to(self._storage.of_tensor(name)) if t.dtype == self._computed and name not in as_they_are else t
            for name, t in state.items()
        }
        coded = {name: packed for name, packed in packs.items() if packed.grid or packed.int8_factors}
        return write_shard(
            self._path(i), state, {name: stored_layer(name, state, packed) for name, packed in coded.items()}
        )

    def finish(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        patterns: Mapping[str, str] | None = None,
        companions: Iterable[Path] = (),
        loader: bool = False,
    ) -> None:
        """Write the index, the generation config, the tokenizer and at last ``config.json``.

        What is compressed is read from the shards, which may come from an earlier run.

        Args:
            model: The model.
            tokenizer: Its tokenizer.
            patterns: Those that the compressed layers obey, by name.
            companions: Files to copy, such as licences; what is written here anyway stays as it is.
            loader: Also write the file by which transformers imports sparlow under ``trust_remote_code=True``.

        Raises:
            RunError: A shard is missing or damaged, or something cannot be written.
        """
        try:
            headers = read_headers(self._path(i) for i in range(len(self._decoder) + 1))
            self._write_index(headers)
            if model.can_generate() and model.generation_config is not None:
                # Not save_pretrained: it refuses what many published models have, as a temperature without sampling.
                path = self._folder / "generation_config.json"
                model.generation_config.to_json_file(path, keys_to_pop=["compile_config"])
            if tokenizer is not None:
                with as_input_error("Cannot write the tokenizer"):  # its library raises anything
                    tokenizer.save_pretrained(self._folder)
            for file in companions:
                if not (self._folder / file.name).exists():
                    with replacing(self._folder / file.name) as partial:
                        shutil.copyfile(file, partial)
            follow_umask(self._folder)
            sync_folder(self._folder)  # what was not written by us
            records = layer_records(headers, patterns, transposed_layers(model))
            self._write_config(model, SparlowConfig.of(records), loader=loader)
            tell_lost(self._lost)
        except (InputError, OSError) as problem:
            if is_out_of_memory(problem):
                raise
            raise RunError(f"Cannot finish {self._folder}: {reason(problem)}.") from problem

    def _write_index(self, headers: Mapping[str, Header]) -> None:
        size = sum(self._path(i).stat().st_size for i in range(len(self._decoder) + 1))
        index = {"metadata": {"total_size": size}, "weight_map": {name: h.file.name for name, h in headers.items()}}
        with replacing(self._folder / INDEX) as partial:
            partial.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")

    def _write_config(self, model: PreTrainedModel, quantization: SparlowConfig, *, loader: bool) -> None:
        config = copy.deepcopy(model.config)
        config.quantization_config = quantization.to_dict()
        config.architectures = [type(model).__name__]
        config.dtype = self._storage.dtype
        if model.is_remote_code():
            private.custom_object_save(model, self._folder, config=config)  # type: ignore[arg-type]  # takes configs too
        elif loader:
            config.auto_map = write_loader(self._folder, type(model).__name__)
        with replacing(self._folder / "config.json") as partial:
            config.to_json_file(partial)

    def _path(self, i: int) -> Path:
        return self._folder / shard_of(i, self._decoder)


def shard_of(i: int, decoder: Decoder) -> str:
    """Return the name of the file of block i; behind the last block, that of all that is outside of blocks."""
    return f"model-{i + 1:05d}-of-{len(decoder) + 1:05d}.safetensors"


def read_block(path: Path | None, decoder: Decoder, i: int, block: nn.Module) -> None:
    """Load block i from its shard into a dense block; its layers become compressed ones.

    The tensors arrive on the block's device, or on the CPU if that is the meta device, in the dtype of the file.

    Raises:
        InputError: There is no such shard, or it does not fit the block.
    """
    if path is None:
        raise InputError(f"There is no shard of block {i} on record. Repeat the command that wrote the others.")
    headers = read_headers([path])
    prefix = decoder.layer_name(i, "")
    device = next((p.device for p in block.parameters() if not p.is_meta), torch.device("cpu"))
    parts = by_layer({name.removeprefix(prefix): header for name, header in headers.items()})
    state = {name.removeprefix(prefix): t for name, t in load_file(path, device=str(device)).items()}
    for stored, record in layer_records(headers).items():
        name, scheme = stored.removeprefix(prefix), record.scheme
        layer = install(block, name, scheme.rank)
        shape = (layer.out_features, layer.in_features)
        check_parts(name, parts.get(name, {}), record, shape=shape, bias=layer.bias is not None)
        weight, layer.stored = take_packed(state, f"{name}.", shape, scheme.grid, scheme.dtype)
        state |= {f"{name}.{part}": tensor for part, tensor in weight._asdict().items()}
    try:
        block.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as problem:
        raise InputError(f"{path.name} does not fit block {i} ({' '.join(str(problem).split())}).") from problem


class Written:
    """The parts of a compressed model, see ``weights.Weights``: as they were written.

    Args:
        find: Gives the path of a shard by its name; None if it was not written yet.
        decoder: Its blocks.
        dense: The parts of the model that was compressed.
        model: The model, if what is outside of its blocks may have been quantised.
    """

    def __init__(
        self,
        find: Callable[[str], Path | None],
        decoder: Decoder,
        dense: Weights,
        model: PreTrainedModel | None = None,
    ) -> None:
        self.device, self.computing = dense.device, dense.computing
        self._find, self._decoder, self._dense, self._model = find, decoder, dense, model

    @contextmanager
    def outside_blocks(self, *, stored: bool = False) -> Iterator[None]:
        """See ``Weights``; an embedding and a head that were quantised have the numbers that were written."""
        with ExitStack() as stack:
            stack.enter_context(self._dense.outside_blocks(stored=stored))
            last = self._find(shard_of(len(self._decoder), self._decoder)) if self._model is not None else None
            if self._model is not None and last is not None:
                stack.enter_context(restored(self._model, last))
            yield

    @contextmanager
    def block(self, i: int, *, load: bool = True) -> Iterator[nn.Module]:
        """See ``Weights``."""
        with self._dense.block(i, load=False) as block:
            if load and not compressed_layers(block):  # in memory they have stayed
                read_block(self._find(shard_of(i, self._decoder)), self._decoder, i, block)
                to_compute(block, self)
            yield block


def load(
    folder: str | Path,
    how: Callable[[], Opening] = Dense,
    **options: Any,  # noqa: ANN401 - those of from_pretrained
) -> PreTrainedModel:
    """Open a compressed model; the same as ``AutoModelForCausalLM.from_pretrained``, but strict.

    Args:
        folder: A directory, or the id of a model on the hub.
        how: What becomes of its compressed layers.
        options: Of ``from_pretrained``, such as dtype and device_map.

    Raises:
        InputError: It is no model that sparlow wrote, or it is unfinished, damaged or from a newer sparlow.
    """
    private.require_format()
    if not options.get("trust_remote_code") and (Path(folder) / CONFIG).exists():
        require_no_kernel(str(folder), str(folder))
    if Path(folder).is_dir():
        _check_before_opening(require_result(Path(folder)))
    else:
        require_place(str(folder), ask=False)
    way = how()
    with as_input_error(f"Cannot open {folder}"), use(lambda: way), private.raising_out_of_memory(), garbage_waits():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, **{"trust_remote_code": False, "use_safetensors": True, **options}
        )
    model: PreTrainedModel = loaded[0]
    info: dict[str, set[str]] = loaded[1]
    if getattr(model, "quantization_method", None) != METHOD and not getattr(way, "used", False):
        raise InputError(f"{folder} is not a model that sparlow compressed. Give one that it wrote.")
    problems = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
    if problems:
        raise InputError(f"The tensors in {folder} are not those of the model, for example {problems[0]}.")
    return model


def _check_before_opening(folder: Path) -> None:
    """Check the small files, before anything large is allocated from what they say.

    Raises:
        InputError: They cannot be trusted.
    """
    read_layers(folder)
    if (folder / "adapter_config.json").exists():
        raise InputError(f"{folder} holds an adapter beside the model, which would be opened too. Move it elsewhere.")
    if (folder / RECORD).exists():
        recorded = read_json(folder / RECORD).get("opens_as", {})
        if not isinstance(recorded, dict):
            raise InputError(f"{folder / RECORD} is not a record of sparlow. Restore it.")
        require_recorded(folder, recorded)
    require_sane(read_json(folder / CONFIG), len(read_index(folder)))
