"""What makes transformers open, train and save models with compressed layers: import it and it is registered.

``config.json`` names the compressed layers under ``quantization_config``. Before any weight is read they take the place
of the meta model's linear layers, and on the way in they are unpacked: ``name.weight``, flat in the file, with its
mask, scales and book becomes ``name.S``, and factors in codes with their scales become ``name.U`` and ``name.V``. A
quantised embedding or head stays the module it is. Other tensors have the names they have in memory, whatever
transformers would call them in a checkpoint of its own.
"""

import os
import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparlow.errors import InputError
from sparlow.files import resolve_inside
from sparlow.machine import garbage_waits
from sparlow.model import _transformers as private
from sparlow.model.artefact.layers import (
    SparseLowRankLinear,
    StillPacked,
    compressed_layers,
    install,
    merged,
    own_weights,
)
from sparlow.model.artefact.loader import forget_loader
from sparlow.model.artefact.opening import Dense, InFile, Opening, opening
from sparlow.model.artefact.outside import HEAD, Outside, check_outside, ends_in_file, mark, outside_modules
from sparlow.model.artefact.packing import packed_state, packed_weights, stored_form, stored_layer
from sparlow.model.artefact.schemes import (
    FORMAT,
    INT8,
    METHOD,
    StoredLayer,
    any_of,
    records_from,
    to_config,
)
from sparlow.model.artefact.shards import Header, by_layer, check_parts, read_headers
from sparlow.model.artefact.stored_form import is_flat, unpack_weight
from sparlow.model.forward.fused_layout import put_together

if TYPE_CHECKING:  # its module imports the list of quantizers, whose import imports this file: see registration.py
    from transformers import PreTrainedModel


@private.register_quantization_config(METHOD)
class SparlowConfig(private.QuantizationConfigMixin):
    """The ``quantization_config`` of a compressed model.

    Args:
        schemes: As config.json has them, see ``schemes``.
        layers: For each compressed layer, by its name in the model, its scheme's number and its count of kept values.
        format: Version of the directory's format.

    Raises:
        InputError: Another version than this code can read, or records that are none.
    """

    def __init__(
        self,
        schemes: Any = (),  # noqa: ANN401 - whatever the file holds
        layers: Any = None,  # noqa: ANN401 - the same
        format: Any = None,  # noqa: A002, ANN401 - a key of config.json, and the same
        **other: Any,  # noqa: ANN401 - the same
    ) -> None:
        private.require_format()
        self.quant_method = METHOD  # type: ignore[assignment]  # the enumeration has only transformers' own methods
        self.records: dict[str, StoredLayer] = {}
        if not other and layers is None and schemes == () and format is None:
            return  # to be filled
        other.pop("quant_method", None)
        self.records = records_from({**other, "format": format, "schemes": schemes, "layers": layers})

    @classmethod
    def of(cls, records: Mapping[str, StoredLayer]) -> "SparlowConfig":
        """Return the config of layers that are known."""
        config = cls()
        config.records = dict(records)
        return config

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json holds."""
        return {"quant_method": METHOD, "format": FORMAT, **to_config(self.records)}


@private.register_quantizer(METHOD)
class SparlowQuantizer(private.HfQuantizer):
    """Puts compressed layers into a meta model before its weights are loaded, and packs them when it is saved."""

    requires_calibration = True  # a dense model is compressed by sparlow.compress, never by from_pretrained
    quantization_config: SparlowConfig

    def __init__(self, quantization_config: SparlowConfig, **kwargs: Any) -> None:  # noqa: ANN401 - transformers'
        super().__init__(quantization_config, **kwargs)
        self._unpack = _Unpack()
        self._outside: list[str] = []  # names of what is stored packed and stays dense in memory
        self._opening: Opening = Dense()
        self._stored_taken: set[str] = set()  # names in the files of layers that transformers does not load

    def is_serializable(self) -> bool:
        """``save_pretrained`` may be called."""
        return True

    @property
    def is_trainable(self) -> bool:
        """``Trainer`` takes the model."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """``Trainer`` asks for no adapter: S, U and V are ordinary parameters, unless they stay packed."""
        return not self._stored_taken

    @garbage_waits()
    def _process_model_before_weight_loading(
        self,
        model: "PreTrainedModel",
        checkpoint_files: list[str] | None = None,
        device_map: Any = None,  # noqa: ANN401 - transformers'
        **_: Any,  # noqa: ANN401 - the same
    ) -> None:
        forget_loader(model.config)
        records, outside = self.quantization_config.records, _outside(model)
        layers: dict[str, SparseLowRankLinear | Outside] = {}
        for name, row in records.items():
            own = _name_in(model, name)
            if own in outside and row.scheme.grid:
                layers[name] = outside[own]
            elif not (row.scheme.grid and not row.scheme.rank and _is_missing_head(model, own)):
                layers[name] = install(model, own, row.scheme.rank)
        self._unpack.expect({_name_in(model, name): records[name] for name in layers})
        self._outside = [name for name, layer in layers.items() if isinstance(layer, Outside)]
        if checkpoint_files is None:
            return
        _require_inside(checkpoint_files, str(model.config.name_or_path))
        headers = read_headers(map(Path, checkpoint_files))
        parts = by_layer(headers)
        for name, layer in layers.items():
            if isinstance(layer, SparseLowRankLinear):
                shape, bias = (layer.out_features, layer.in_features), layer.bias is not None
                check_parts(name, parts.get(name, {}), records[name], shape=shape, bias=bias)
            elif name in parts or not _is_tied(model, layer.name):
                check_outside(layer, parts.get(name, {}), records[name])
        _check_rest(model, headers, [layer.name for layer in layers.values() if isinstance(layer, Outside)])
        self._opening = opening()
        found = {
            name: InFile(_name_in(model, name), name, records[name], parts[name])
            for name, layer in layers.items()
            if isinstance(layer, SparseLowRankLinear)
        }
        ends = {name: layer for name, layer in layers.items() if isinstance(layer, Outside)}
        self._take(model, found | ends_in_file(model, ends, records, parts), device_map)

    def _take(self, model: "PreTrainedModel", layers: Mapping[str, InFile], device_map: object) -> None:
        """Let layers, by the names of their records, be opened in another way; transformers expects no tensors then."""
        taken = set(self._opening.before(model, [*layers.values()], device_map))
        self._stored_taken = {name for name, layer in layers.items() if layer.name in taken}
        if taken:
            names = any_of(sorted({*self._stored_taken, *taken}))
            known = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
            model._keys_to_ignore_on_load_unexpected = {*known, rf"^{names}\.\w+$"}  # noqa: SLF001 - no public way

    def get_weight_conversions(self) -> list[Any]:
        """Return how the tensors of the layers on record, and of no others, become S, U and V or a dense weight."""
        alike: dict[tuple[str, tuple[str, ...]], list[str]] = {}
        for name, row in self.quantization_config.records.items():
            outside = name in self._outside
            if name in self._stored_taken:
                continue
            every = outside or row.scheme.factors == INT8 or private.TELLS_DTYPE
            parts = [part for part in row.scheme.parts if every or part not in ("U", "V")]
            alike.setdefault(("weight" if outside else "S", tuple(parts)), []).append(name)
        return [
            private.ManyLayers(
                [rf"^({any_of(sorted(names))})\.{part}$" for part in parts], [rf"\1.{target}"], [self._unpack]
            )
            for (target, parts), names in alike.items()
        ]

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:  # noqa: ANN401 - transformers', from 5.21 on
        """Return the type to cast a tensor to on the way in: what is unpacked is cast afterwards."""
        if isinstance(converter, private.ManyLayers):
            converter.wanted = dtype
            return None
        return super().get_new_dtype(converter, param, dtype)

    def update_weight_conversions(
        self,
        weight_conversions: list[Any],  # noqa: ARG002 - dropped: from a checkpoint's names to those in memory
        model: "PreTrainedModel | None" = None,  # noqa: ARG002 - given by transformers 5.21 and later
    ) -> list[Any]:
        """Return the conversions of this format in place of the architecture's."""
        return self.get_weight_conversions()

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **_: Any) -> None:  # noqa: ANN401 - transformers'
        if self._unpack.problems:
            raise InputError(self._unpack.problems[0])
        # Up to 5.20, transformers leaves what was packed in the type of the file, whatever type was asked for.
        for layer in compressed_layers(model).values():
            layer.S.data = layer.S.data.to(layer.U.dtype)
        # What save_pretrained would undo: nothing, names stay those in memory.
        model._weight_conversions = []  # type: ignore[assignment]  # noqa: SLF001 - no public way
        if not self._opening.after(model):
            self.remove_quantization_config(model)  # type: ignore[no-untyped-call]  # untyped there

    def _dequantize(self, model: "PreTrainedModel", dtype: torch.dtype | None = None) -> "PreTrainedModel":
        """Put one dense weight S + U V in the place of every compressed layer: ``model.dequantize()``."""
        for name, module in list(model.named_modules()):
            layer = module.dequantize() if isinstance(module, StillPacked) else module
            if isinstance(layer, SparseLowRankLinear):
                model.set_submodule(name, merged(layer.to(dtype or layer.S.dtype)))
            elif layer is not module:
                model.set_submodule(name, layer.to(dtype))
        put_together(model)
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        if model.config.tie_word_embeddings and head is not None:
            head.weight = embedding.weight
        return model

    def get_state_dict_and_metadata(self, model: "PreTrainedModel") -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return what ``save_pretrained`` writes after the config, whose records follow the model as it is now."""
        state, packs = packed_state(model)
        known = self.quantization_config.records
        flat = [name for name in known if name not in packs and is_flat(state.get(f"{name}.weight"))]
        self.quantization_config.records = records = {
            name: stored_layer(
                name,
                state,
                packed,
                known[name].scheme.pattern if name in known else None,
                transposed=name in known and known[name].scheme.transposed,
            )
            for name, packed in packs.items()
        } | {name: known[name] for name in flat}
        at = {name: state[f"{name}.weight"].data_ptr() for name in flat}
        head = next((end.name for end in outside_modules(model).values() if end.what == HEAD), "")
        if head in at and [*at.values()].count(at[head]) > 1:  # tied: written once, by the other name
            state = {key: t for key, t in state.items() if key.rpartition(".")[0] != head}
        gone = [name for name, row in known.items() if row.scheme.grid and name not in records]
        if gone and not any(stored_form(module) for name, module in model.named_modules() if name in gone):
            warnings.warn(f"{gone[0]} has been replaced, so it is stored in the model's own type.", stacklevel=2)
        return state, {}


class _Unpack(private.ConversionOps):
    """Packed tensors → S, U and V; notes what is wrong, because transformers turns any exception into a table."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self._records: dict[str, StoredLayer] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Unpack":
        return self  # transformers copies the conversion for each layer

    def expect(self, records: Mapping[str, StoredLayer]) -> None:
        """Say how layers are stored, by their names in the model."""
        self._records = dict(records)

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],  # noqa: ARG002 - the same as the keys of the tensors
        target_patterns: list[str],  # noqa: ARG002 - of all layers; this one's name is in kwargs
        **kwargs: Any,  # noqa: ANN401 - transformers'
    ) -> dict[str, Any]:
        target, model = kwargs["full_layer_name"], kwargs["model"]
        name, _, last = target.rpartition(".")
        # A pattern is as long as all names together, so it is read from its end: «….part$».
        tensors = {pattern[pattern.rindex(".") + 1 : -1]: found[0] for pattern, found in input_dict.items()}
        scheme, whole = self._records[name].scheme, model.get_parameter(target)
        ours = {last: "S"} if last == "weight" else {part: part for part in ("S", *(tensors.keys() & {"U", "V"}))}
        empty = {
            part: whole.new_empty(size, device="cpu")
            for part, size in (("U", (len(whole), 0)), ("V", (0, whole.shape[1])))
        }
        try:
            weight, form = unpack_weight(empty | tensors, tuple(whole.shape), scheme.grid, scheme.dtype)
        except InputError as problem:
            self.problems.append(f"{name}: {problem}")
            return {target: torch.zeros(whole.shape, dtype=whole.dtype)}
        module = model.get_submodule(name)
        if last == "weight" and form is not None:
            mark(module, form)
        elif last == "S":
            module.stored = form
        return {f"{name}.{mine}": getattr(weight, part).to(whole.dtype) for mine, part in ours.items()}


def attach(model: "PreTrainedModel", patterns: Mapping[str, str] | None = None) -> None:
    """Let a model that was compressed in memory train and ``save_pretrained`` like one that was opened.

    Args:
        model: The model.
        patterns: Those that its layers obey, by name.
    """
    transposed = set(transposed_layers(model))
    records = {
        name: stored_layer(name, {}, packed, (patterns or {}).get(name), transposed=name in transposed)
        for name, packed in packed_weights(model)
    }
    quantizer = SparlowQuantizer(SparlowConfig.of(records))
    for attribute, value in {"hf_quantizer": quantizer, "is_quantized": True, "quantization_method": METHOD}.items():
        setattr(model, attribute, value)  # as from_pretrained does it
    quantizer.postprocess_model(model)


def transposed_layers(model: "PreTrainedModel") -> list[str]:
    """Return the layers of a model that its own class stores as (in, out)."""
    return [name for name, weight in own_weights(model).items() if weight.transposed]


def _name_in(model: "PreTrainedModel", name: str) -> str:
    """Return a layer's name in this model, which may be the decoder without its head."""
    top = {child for child, _ in model.named_children()}
    return name if name.split(".", 1)[0] in top else name.removeprefix(f"{model.base_model_prefix}.")


def _outside(model: "PreTrainedModel") -> dict[str, Outside]:
    """Return the embedding and the head by their names in the model."""
    return {outside.name: outside for outside in outside_modules(model).values()}


def _is_missing_head(model: "PreTrainedModel", name: str) -> bool:
    """Whether a model was opened without its head, and a name that it lacks may be that."""
    untyped: Any = model  # transformers does not annotate this method
    return untyped.get_output_embeddings() is None and name not in dict(model.named_modules())


def _is_tied(model: "PreTrainedModel", name: str) -> bool:
    return f"{name}.weight" in (model.all_tied_weights_keys or {})


def _check_rest(model: "PreTrainedModel", headers: Mapping[str, Header], outside: Collection[str]) -> None:
    """Refuse shapes unlike the meta model's, which transformers would fill at random, and types it cannot use."""
    compressed = {*compressed_layers(model), *outside}
    for name, tensor in model.state_dict().items():
        header = headers.get(name) or headers.get(f"{model.base_model_prefix}.{name}")
        if not header or name.rpartition(".")[0] in compressed:
            continue
        if tensor.is_floating_point() and not header.floats:
            raise InputError(f"{name} should hold floating-point numbers, and the file holds others. Fetch it anew.")
        if header.shape != tuple(tensor.shape):
            shapes = f"{tuple(tensor.shape)}, but the file holds {header.shape}"
            raise InputError(f"{name} should have the shape {shapes}. Check that config.json belongs to this model.")


def _require_inside(files: Iterable[str], folder: str) -> None:
    """Refuse an index that leads out of the model's directory (a download is kept in its place by the hub client)."""
    root = Path(os.path.abspath(folder))  # noqa: PTH100 - resolve would follow links, which are how caches store files
    for file in files:
        if root.is_dir() and root not in Path(os.path.abspath(file)).parents:  # noqa: PTH100 - the same
            raise InputError(f"The index names {file}, which is not in the model's directory. Fetch the model anew.")
        resolve_inside(Path(file).parent, Path(file).name)
