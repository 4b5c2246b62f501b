"""Every name that sparlow imports from outside the public interface of transformers is imported here, and only here.

A release may rename any of them. ``import sparlow`` works all the same, and so does what needs none of them: a model
whose weights cannot be read part by part is opened whole, with a warning, and everything else says what is missing.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch

from sparlow.errors import InputError, is_out_of_memory

STREAMING = (
    "LoadStateDictConfig",
    "NO_STREAMING",
    "WeightRenaming",
    "cached_file",
    "convert_and_load_state_dict_in_model",
    "get_checkpoint_shard_files",
    "get_model_conversion_mapping",
    "rename_source_key",
    "revert_weight_conversion",
)
__all__ = [
    "ConversionOps",
    "HfQuantizer",
    "ManyLayers",
    "QuantizationConfigMixin",
    "WeightConverter",
    "custom_object_save",
    "register_quantization_config",
    "register_quantizer",
]
VERSION = version("transformers")


def _lacks(problem: ImportError) -> str:
    """Say what a release lacks, without the path that Python adds."""
    return f"transformers {VERSION} differs from the releases that sparlow knows: {str(problem).split(' (')[0]}"


NO_FORMAT: str | None = None  # why compressed models cannot be opened or written, see quantizer
try:
    from transformers.core_model_loading import ConversionOps, WeightConverter
    from transformers.dynamic_module_utils import custom_object_save
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as problem:
    NO_FORMAT = _lacks(problem)
    # classes can still be derived and decorated, and require_format sees that none of them is used
    ConversionOps = HfQuantizer = QuantizationConfigMixin = WeightConverter = object  # type: ignore[misc, assignment]
    register_quantization_config = register_quantizer = lambda _: lambda cls: cls  # type: ignore[assignment]


TELLS_DTYPE = hasattr(HfQuantizer, "get_new_dtype")  # from 5.21 on, of every tensor that a converter takes


class ManyLayers(WeightConverter):
    """A converter of the tensors of thousands of layers, of which transformers makes a copy for each.

    Copies share the expressions, which are as long as all names together.
    """

    wanted: torch.dtype | None = None  # that of the model's tensors; None: the operations have seen to it

    def __deepcopy__(self, memo: dict[int, Any]) -> "ManyLayers":
        found = object.__new__(type(self))  # copy.copy takes three times as long, and there is one for each tensor
        for name in (name for cls in type(self).__mro__ for name in vars(cls).get("__slots__", ())):
            if hasattr(self, name):
                object.__setattr__(found, name, getattr(self, name))
        vars(found).update(vars(self))
        found.collected_tensors, found.layer_targets = defaultdict(list), defaultdict(set)
        return found

    def convert(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - transformers'
        """Return the tensors by their names in the model."""
        found: Any = super().convert(*args, **kwargs)
        return {name: tensor.to(self.wanted) for name, tensor in found.items()} if self.wanted else found


def _streaming() -> dict[str, Any]:
    """Names that read weights part by part, see streaming.OnDisk.

    They are looked up when they are first used: transformers may still be on its way in when this file is imported.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightRenaming,
        convert_and_load_state_dict_in_model,
        rename_source_key,
        revert_weight_conversion,
    )
    from transformers.modeling_utils import LoadStateDictConfig
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    return {
        "LoadStateDictConfig": LoadStateDictConfig,
        "WeightRenaming": WeightRenaming,
        "cached_file": cached_file,
        "convert_and_load_state_dict_in_model": convert_and_load_state_dict_in_model,
        "get_checkpoint_shard_files": get_checkpoint_shard_files,
        "get_model_conversion_mapping": get_model_conversion_mapping,
        "rename_source_key": rename_source_key,
        "revert_weight_conversion": revert_weight_conversion,
        "NO_STREAMING": None,
    }


def __getattr__(name: str) -> Any:  # noqa: ANN401 - classes and functions of transformers
    """Look up a name of streaming; ``NO_STREAMING`` says why weights cannot be read part by part, or is None."""
    if name not in STREAMING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        found = _streaming()
    except ImportError as problem:
        found = {"NO_STREAMING": _lacks(problem)}
    globals().update(found)
    if name not in found:
        raise AttributeError(found["NO_STREAMING"])
    return found[name]


def _module(name: str) -> Any:  # noqa: ANN401 - a module of which functions are replaced, or None
    """Return a module of transformers of which something is replaced for a while; a release may have it no more."""
    with suppress(ImportError):
        return import_module(f"transformers.{name}")
    return None


@contextmanager
def raising_out_of_memory() -> Iterator[None]:
    """Within this context, memory that runs out while weights are converted is raised.

    transformers would list it as a fault of the file, go on, and say in the end that some weights could not be read.
    """
    loading = _module("core_model_loading")
    listing: Any = getattr(loading, "log_conversion_errors", None)
    if listing is None:
        yield
        return

    @contextmanager
    def raising(*args: Any, **kwargs: Any) -> Iterator[None]:  # noqa: ANN401 - transformers'
        found = None
        with listing(*args, **kwargs):
            try:
                yield
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                found = error
        if found is not None:
            raise found

    loading.log_conversion_errors = raising
    try:
        yield
    finally:
        loading.log_conversion_errors = listing


_unpacked: ContextVar[bool] = ContextVar("unpacked", default=False)


@contextmanager
def texts_of_their_own() -> Iterator[None]:
    """Within this context, transformers does not look whether a row holds several texts: a device is waited for then.

    Only in this thread, and only where no attention is computed, or positions are those of one text.
    """
    masks = _module("masking_utils")
    looking = getattr(masks, "find_packed_sequence_indices", None)
    if looking is None:
        yield
        return
    masks.find_packed_sequence_indices = lambda positions: None if _unpacked.get() else looking(positions)
    token = _unpacked.set(True)
    try:
        yield
    finally:
        _unpacked.reset(token)
        masks.find_packed_sequence_indices = looking


def require_format() -> None:
    """See that compressed models can be opened and written.

    Raises:
        InputError: This release of transformers lacks something that is needed for it.
    """
    if NO_FORMAT:
        raise InputError(f"Compressed models cannot be opened or written: {NO_FORMAT}. Install an older transformers.")


def reporting_integrations() -> list[str]:
    """Return the names that Trainer's ``report_to`` takes on this machine.

    Raises:
        InputError: This release of transformers does not tell.
    """
    try:
        from transformers.integrations.integration_utils import get_available_reporting_integrations
    except ImportError as problem:
        raise InputError(f"report_to must be none: {_lacks(problem)}.") from problem
    found: list[str] = get_available_reporting_integrations()
    return found


def accelerator_takes_bf16() -> bool:
    """Whether Trainer computes in bfloat16 on the accelerator of this machine.

    Raises:
        InputError: This release of transformers does not tell.
    """
    try:
        from transformers.utils.import_utils import is_torch_bf16_gpu_available
    except ImportError as problem:
        raise InputError(f"Leave out --bf16: {_lacks(problem)}.") from problem
    untyped: Any = is_torch_bf16_gpu_available
    return bool(untyped())


def cache_layer() -> Any:  # noqa: ANN401 - a class of transformers
    """Return the class of a layer's keys and values in a cache that grows.

    Raises:
        InputError: This release of transformers has none.
    """
    try:
        from transformers.cache_utils import DynamicLayer
    except ImportError as problem:
        raise InputError(f"There is no cache to step through: {_lacks(problem)}.") from problem
    return DynamicLayer
