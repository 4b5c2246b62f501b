"""Logits by transformers and PEFT: ``python peft_logits.py BASE IDS.npy OUT.npy [ADAPTER]``; sparlow is not needed.

A base of compressed-tensors is opened in floats, as PEFT needs it.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

if __name__ == "__main__":
    base, ids, out, *adapters = sys.argv[1:]
    config = json.loads((Path(base) / "config.json").read_text("utf-8"))
    coded = "quantization_config" in config
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if coded else {}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **options)
    for adapter in adapters:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        found = [model(torch.from_numpy(row[None]).long()).logits.float().numpy()[0] for row in np.load(ids)]
    np.save(out, np.stack(found))
    if "sparlow" in sys.modules:
        raise SystemExit("sparlow was imported, so this shows nothing")
