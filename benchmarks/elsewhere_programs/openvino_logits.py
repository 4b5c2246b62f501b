"""Logits by OpenVINO on the CPU: ``python openvino_logits.py MODEL IDS.npy OUT.npy``; needs openvino and transformers.

The model goes from transformers to OpenVINO by its converter, so that optimum-intel is not needed.
"""

import sys

import numpy as np
import openvino
import torch
from transformers import AutoModelForCausalLM


class Logits(torch.nn.Module):
    """Token ids to logits, and nothing else, which is what the converter traces."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the logits (1, tokens, vocabulary)."""
        found: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits
        return found


if __name__ == "__main__":
    folder, file, out = sys.argv[1:]
    windows = np.load(file).astype(np.int64)
    own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    converted = openvino.convert_model(Logits(own.eval()), example_input=torch.from_numpy(windows[:1]))
    compiled = openvino.Core().compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    np.save(out, np.concatenate([compiled(row[None])[0] for row in windows]))
