"""What makes transformers open, train and save models with compressed layers: import it and it is registered.

``config.json`` names the compressed layers under ``quantization_config``. Before any weight is read they take the place
of the meta model's linear layers, and on the way in each mask and its values are unpacked: ``name.weight``, flat in the
file, and ``name.mask`` become ``name.S``. Other tensors have the names they have in memory, whatever transformers would
call them in a checkpoint of its own.
"""

import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sparlow.errors import InputError
from sparlow.files import resolve_inside
from sparlow.model import _transformers as private
from sparlow.model.artefact.bitmask import unpack
from sparlow.model.artefact.layers import compressed_layers, install, own_weights
from sparlow.model.artefact.loader import forget_loader
from sparlow.model.artefact.schemes import (
    DENSE,
    FORMAT,
    METHOD,
    Scheme,
    StoredLayer,
    any_of,
    from_config,
    name_of,
    stored_pattern,
    to_config,
)
from sparlow.model.artefact.shards import Header, by_layer, check_layer, packed_state, read_headers

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
        _require_format_two(format)
        for key in sorted(other.keys() - {"quant_method"})[:1]:
            raise InputError(f"quantization_config has {key!r}, which a newer sparlow wrote. Upgrade sparlow.")
        self.records = from_config(schemes, layers)

    @classmethod
    def of(cls, records: Mapping[str, StoredLayer]) -> "SparlowConfig":
        """Return the config of layers that are known."""
        config = cls()
        config.records = dict(records)
        return config

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json holds."""
        return {"quant_method": METHOD, "format": FORMAT, **to_config(self.records)}


def _require_format_two(found: object) -> None:
    if type(found) is int and found == FORMAT:
        return
    if type(found) is int and found < FORMAT:
        raise InputError(
            f"The model was written by an older sparlow (format {found}, this one reads {FORMAT}). "
            "Compress the model again."
        )
    raise InputError(
        f"The model was written by a newer sparlow (format {found!r}, this one reads {FORMAT}). Upgrade sparlow."
    )


@private.register_quantizer(METHOD)
class SparlowQuantizer(private.HfQuantizer):
    """Puts compressed layers into a meta model before its weights are loaded, and packs them when it is saved."""

    requires_calibration = True  # a dense model is compressed by sparlow.compress, never by from_pretrained
    quantization_config: SparlowConfig

    def __init__(self, quantization_config: SparlowConfig, **kwargs: Any) -> None:  # noqa: ANN401 - transformers'
        super().__init__(quantization_config, **kwargs)
        self._unpack = _Unpack()

    def is_serializable(self) -> bool:
        """``save_pretrained`` may be called."""
        return True

    @property
    def is_trainable(self) -> bool:
        """``Trainer`` takes the model."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """``Trainer`` asks for no adapter: S, U and V are ordinary parameters."""
        return True

    def _process_model_before_weight_loading(
        self,
        model: "PreTrainedModel",
        checkpoint_files: list[str] | None = None,
        **_: Any,  # noqa: ANN401 - transformers'
    ) -> None:
        forget_loader(model.config)
        layers = self.quantization_config.records
        installed = {name: install(model, _name_in(model, name), row.scheme.rank) for name, row in layers.items()}
        if checkpoint_files is None:
            return
        _require_inside(checkpoint_files, str(model.config.name_or_path))
        headers = read_headers(map(Path, checkpoint_files))
        parts = by_layer(headers)
        for name, layer in installed.items():
            check_layer(name, parts.get(name, {}), layer, layers[name])
        _check_rest(model, headers)

    def get_weight_conversions(self) -> list[Any]:
        """Return how the kept values and the mask of the layers on record, and of no others, become S."""
        layers = self.quantization_config.records
        whole = [name for name, row in layers.items() if row.scheme.pattern == DENSE]
        conversions = []
        for names, parts in ((layers.keys() - set(whole), ("weight", "mask")), (whole, ("weight",))):
            if names:
                sources = [rf"^({any_of(sorted(names))})\.{part}$" for part in parts]
                conversions.append(private.WeightConverter(sources, [r"\1.S"], [self._unpack]))
        return conversions

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

    def get_state_dict_and_metadata(self, model: "PreTrainedModel") -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return what ``save_pretrained`` writes after the config, whose records follow the model as it is now."""
        state = packed_state(model)
        known = self.quantization_config.records
        patterns = {name: row.scheme.pattern for name, row in known.items()}
        transposed = [name for name, row in known.items() if row.scheme.transposed]
        self.quantization_config.records = _records(model, patterns, transposed)
        return state, {}


class _Unpack(private.ConversionOps):
    """values and mask → S; notes what is wrong, because transformers turns any exception into a table."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Unpack":
        return self  # transformers copies the conversion for each layer

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],  # noqa: ARG002 - of all layers; this one's name is in kwargs
        **kwargs: Any,  # noqa: ANN401 - transformers'
    ) -> dict[str, Any]:
        values, mask = (*(input_dict[pattern][0] for pattern in source_patterns), None)[:2]
        name = kwargs["full_layer_name"]
        shape = kwargs["model"].get_parameter(name).shape
        try:
            S = unpack(values, mask, shape)
        except InputError as problem:
            self.problems.append(f"{name.removesuffix('.S')}: {problem}")
            S = values.new_zeros(shape)
        return {name: S}


def attach(model: "PreTrainedModel", patterns: Mapping[str, str] | None = None) -> None:
    """Let a model that was compressed in memory train and ``save_pretrained`` like one that was opened.

    Args:
        model: The model.
        patterns: Those that its layers obey, by name.
    """
    quantizer = SparlowQuantizer(SparlowConfig.of(_records(model, patterns or {}, transposed_layers(model))))
    for attribute, value in {"hf_quantizer": quantizer, "is_quantized": True, "quantization_method": METHOD}.items():
        setattr(model, attribute, value)  # as from_pretrained does it
    quantizer.postprocess_model(model)


def transposed_layers(model: "PreTrainedModel") -> list[str]:
    """Return the layers of a model that its own class stores as (in, out)."""
    return [name for name, weight in own_weights(model).items() if weight.transposed]


def _records(
    model: "PreTrainedModel", patterns: Mapping[str, str], transposed: Collection[str]
) -> dict[str, StoredLayer]:
    records = {}
    for name, layer in compressed_layers(model).items():
        shape, kept = (layer.out_features, layer.in_features), int(layer.S.count_nonzero())
        pattern = stored_pattern(shape, kept, patterns.get(name))
        scheme = Scheme(pattern, name_of(layer.S.dtype), layer.rank, name_of(layer.U.dtype), name in transposed)
        records[name] = StoredLayer(scheme, kept)
    return records


def _name_in(model: "PreTrainedModel", name: str) -> str:
    """Return a layer's name in this model, which may be the decoder without its head."""
    top = {child for child, _ in model.named_children()}
    return name if name.split(".", 1)[0] in top else name.removeprefix(f"{model.base_model_prefix}.")


def _check_rest(model: "PreTrainedModel", headers: Mapping[str, Header]) -> None:
    """Refuse tensors whose shapes differ from the meta model's, which transformers would fill at random."""
    compressed = compressed_layers(model).keys()
    for name, tensor in model.state_dict().items():
        header = headers.get(name) or headers.get(f"{model.base_model_prefix}.{name}")
        if header and name.rpartition(".")[0] not in compressed and header.shape != tuple(tensor.shape):
            shapes = f"{tuple(tensor.shape)}, but the file holds {header.shape}"
            raise InputError(f"{name} should have the shape {shapes}. Check that config.json belongs to this model.")


def _require_inside(files: Iterable[str], folder: str) -> None:
    """Refuse an index that leads out of the model's directory (a download is kept in its place by the hub client)."""
    root = Path(os.path.abspath(folder))  # noqa: PTH100 - resolve would follow links, which are how caches store files
    for file in files:
        if root.is_dir() and root not in Path(os.path.abspath(file)).parents:  # noqa: PTH100 - the same
            raise InputError(f"The index names {file}, which is not in the model's directory. Fetch the model anew.")
        resolve_inside(Path(file).parent, Path(file).name)
