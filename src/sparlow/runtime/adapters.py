"""Teaches PEFT to put LoRA on compressed layers, packed or dense, as soon as it is imported.

PEFT asks each config of LoRA for the classes of layers that it does not know; so every config is told of ours. That
method of PEFT has an underscore, but it is the one that its guide for layers of one's own describes.
"""

import functools
import sys
from typing import Any

from sparlow.model.artefact.registration import when_imported

CONFIG = "peft.tuners.lora.config"


def _teach() -> None:
    config: Any = sys.modules[CONFIG].LoraConfig
    own = config.__post_init__

    @functools.wraps(own)
    def with_ours(self: Any) -> None:  # noqa: ANN401 - a LoraConfig
        from sparlow.model.artefact.layers import SparseLowRankLinear
        from sparlow.runtime.lora import CompressedLora
        from sparlow.runtime.packed import PackedLinear

        own(self)
        self._register_custom_module({PackedLinear: CompressedLora, SparseLowRankLinear: CompressedLora})

    config.__post_init__ = with_ours


when_imported(CONFIG, _teach)
