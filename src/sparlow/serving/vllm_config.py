"""Which of vLLM's layers are compressed, and what computes them."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from sparlow.errors import InputError
from sparlow.model.artefact.schemes import DENSE, METHOD, StoredLayer, records_from


class SparlowConfig(QuantizationConfig):  # type: ignore[misc]  # vLLM's class, which is not here when types are checked
    """The ``quantization_config`` of a compressed model, as vLLM wants it.

    Args:
        records: How each layer is stored, by its name.
    """

    def __init__(self, records: Mapping[str, StoredLayer]) -> None:
        super().__init__()
        self.records = dict(records)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "SparlowConfig":
        """Read what config.json holds.

        Raises:
            InputError: Another version wrote it, or it is damaged.
        """
        return cls(records_from({key: value for key, value in config.items() if key != "quant_method"}))

    def get_name(self) -> str:
        """Return the name of the method."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return the types in which vLLM may compute what is between the layers."""
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return 0: on an accelerator the layers are ordinary dense ones."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return none: all is in config.json."""
        return []

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:  # noqa: ANN401 - vLLM's
        """Rename the records where vLLM's model has other names."""
        self.records = hf_to_vllm_mapper.apply_dict(self.records)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:  # noqa: ANN401 - one of vLLM's classes
        """Return what computes a layer; None for vLLM's own way.

        Raises:
            InputError: The layer's weights are compressed in a form that cannot be served.
        """
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

        from sparlow.serving.vllm_methods import SparlowEmbeddingMethod, SparlowLinearMethod

        if isinstance(layer, LinearBase):
            parts = self._parts(prefix)
            return SparlowLinearMethod(parts) if any(parts.values()) else UnquantizedLinearMethod()
        if isinstance(layer, VocabParallelEmbedding):
            known = [self.records[prefix]] if prefix in self.records else []
            if not prefix and not isinstance(layer, ParallelLMHead):  # many models give their embedding no name
                known = self._embeddings(layer.org_vocab_size, layer.embedding_dim)
            return SparlowEmbeddingMethod({prefix or "the embedding": known}) if known else None
        inside = next((name for name in self.records if prefix and _is_in(name, prefix)), None)
        if inside:
            raise InputError(
                f"{inside} is compressed and part of a {type(layer).__name__}, which the plug-in cannot serve. "
                "Serve what sparlow export DIR --out OUT --as merged writes."
            )
        return None

    def _parts(self, prefix: str) -> dict[str, list[StoredLayer]]:
        """Return the names of the stored weights that one of vLLM's linear layers joins, and their records, if any."""
        head, dot, last = prefix.rpartition(".")
        names = [f"{head}{dot}{name}" for name in self.packed_modules_mapping.get(last, [last])]
        return {name: [self.records[name]] if name in self.records else [] for name in names}

    def _embeddings(self, rows: int, columns: int) -> list[StoredLayer]:
        """Return the ways in which an embedding of this shape may be stored, the head's among them."""
        found = []
        for name, record in self.records.items():
            outside = re.match(r".*?\.\d+\.", name) is None  # decoder blocks have numbers
            if outside and record.scheme.pattern == DENSE and record.kept == rows * columns and record not in found:
                found.append(record)
        return found


def _is_in(name: str, prefix: str) -> bool:
    """Whether a compressed layer is part of one of vLLM's that is neither linear nor an embedding.

    Experts have a number for their last name. What vLLM calls the module around them may be what it is called in the
    checkpoints of a family, and not in transformers' class; then they are known by the block that they are in.
    """
    if name.startswith(f"{prefix}."):
        return True
    block = re.match(r".*?\.\d+\.", prefix)
    experts = block is not None and prefix.endswith(".experts") and name.startswith(block[0])
    return experts and name.rpartition(".")[2].isdecimal()
