"""Logits by MLX on the CPU: ``python mlx_logits.py MODEL IDS.npy OUT.npy``; needs mlx-cpu (or mlx) and mlx-lm."""

import sys

import mlx.core as mx
import numpy as np
from mlx_lm import load

if __name__ == "__main__":
    folder, ids, out = sys.argv[1:]
    model, _ = load(folder)
    model.set_dtype(mx.float32)
    found = [np.asarray(model(mx.array(row[None]))[0].astype(mx.float32)) for row in np.load(ids)]
    np.save(out, np.stack(found))
