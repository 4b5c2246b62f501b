"""World 1: tensors. Patterns, Gram matrices, low-rank fits and least squares; knows torch only."""
