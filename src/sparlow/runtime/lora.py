"""LoRA of PEFT on a compressed layer: its weight is only read through products, and never written to."""

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import nn

from sparlow.errors import InputError
from sparlow.runtime.packed import PackedLinear

_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # that leave the layer below as it is


class CompressedLora(Linear):
    """y = layer(x) + (alpha / r) B A x; the layer is packed or has S, U and V, and stays what it is.

    PEFT would write a merged weight into ``layer.weight``, which is computed at each access here, so that it would be
    lost; whatever needs that is refused.
    """

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **options: Any) -> None:  # noqa: ANN401 - PEFT's
        """Add an adapter.

        Raises:
            InputError: It would change the layer itself.
        """
        start = config.init_lora_weights
        if start not in _STARTS:
            raise InputError(
                f"With init_lora_weights={start!r} PEFT changes the compressed layer itself. Choose True, 'gaussian' "
                "or 'orthogonal', or open the model with mode='merged'."
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **options)

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        """Plain LoRA alone."""
        return {(): None}

    def resolve_lora_variant(self, *, config: LoraConfig, **options: Any) -> None:  # noqa: ANN401 - PEFT's
        """Return nothing: plain LoRA has no variant.

        Raises:
            InputError: The config asks for one.
        """
        try:
            super().resolve_lora_variant(config=config, **options)
        except ValueError as problem:
            raise InputError(
                f"Compressed layers take plain LoRA only ({str(problem).rstrip('.')}). Leave the variant out, or open "
                "the model with mode='merged'."
            ) from None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:  # noqa: ARG002 - PEFT's form
        """Refuse.

        Raises:
            InputError: Always.
        """
        raise InputError(
            "An adapter cannot be merged into a compressed layer. Open the model with mode='merged', put the adapter "
            "on that, and merge it there."
        )

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]  # of both our layers

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        """Return where adapters go, and in which type, without computing a weight."""
        if isinstance(base_layer, PackedLinear):
            return torch.device("cpu"), base_layer.packed.dtype
        return base_layer.S.device, base_layer.S.dtype  # type: ignore[return-value]  # a SparseLowRankLinear
