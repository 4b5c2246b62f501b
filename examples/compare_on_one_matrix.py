"""Every registered method on one synthetic layer: relative error and seconds.

python examples/compare_on_one_matrix.py
"""

import torch

import sparlow
from sparlow.algorithms import algorithms

generator = torch.Generator().manual_seed(0)
X = torch.randn(4096, 48, generator=generator) @ torch.randn(48, 256, generator=generator)
X += 2 * torch.randn(4096, 256, generator=generator)  # (tokens, in): correlated features and noise
W = torch.randn(256, 256, generator=generator)

for algorithm in algorithms():
    rank = 0 if algorithm.kind == "pruner" else 16
    found = sparlow.decompose(W, 2 * X.T @ X, pattern="16:32", rank=rank, algorithm=algorithm.name)
    print(f"{algorithm.name:12} {found.stats['relative_error']:.5f}  {found.stats['seconds']:.2f} s")
