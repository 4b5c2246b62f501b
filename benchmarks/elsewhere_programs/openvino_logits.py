"""Logits by OpenVINO on the CPU: ``python openvino_logits.py MODEL IDS.npy OUT.npy``; needs openvino and transformers.

The model goes from transformers to OpenVINO by its converter, so that optimum-intel is not needed.
"""

import sys

import numpy as np
import openvino
import torch
from transformers import AutoModelForCausalLM


class Logits(torch.nn.Module):
    """Ids of so many tokens to logits, and nothing else, which is what the converter traces.

    The mask is given as a whole, because the converter has no rule for what transformers does to make one.
    """

    def __init__(self, model: torch.nn.Module, tokens: int) -> None:
        super().__init__()
        self.model = model
        least = torch.finfo(torch.float32).min
        self.register_buffer("mask", torch.full((1, 1, tokens, tokens), least).triu(1))
        self.register_buffer("places", torch.arange(tokens)[None])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the logits (1, tokens, vocabulary)."""
        options = {"attention_mask": self.mask, "position_ids": self.places, "use_cache": False}
        found: torch.Tensor = self.model(input_ids=ids, **options).logits
        return found


if __name__ == "__main__":
    folder, file, out = sys.argv[1:]
    windows = np.load(file).astype(np.int64)
    own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    converted = openvino.convert_model(
        Logits(own.eval(), windows.shape[1]), example_input=torch.from_numpy(windows[:1])
    )
    compiled = openvino.Core().compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    np.save(out, np.concatenate([compiled(row[None])[0] for row in windows]))
