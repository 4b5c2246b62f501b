"""How much of a training is left once its numbers are rounded to the type they are stored in."""

import torch
from torch import Tensor, nn

from sparlow.model.artefact.layers import compressed_layers

SAMPLE = 4096  # numbers of each part of each layer that are looked at
NOTHING = 0.9  # share of numbers that are where they were, from which on a training is said to be undone


class Unmoved:
    """Remembers some numbers of compressed layers before they are trained.

    Args:
        root: The block or model; its layers have the values they would be stored with.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root, self._before = root, _sample(root)

    def share(self) -> float:
        """Share of these numbers that are what they were; 0 if there are none."""
        after = _sample(self._root)
        same = sum(int((after[name] == kept).sum()) for name, kept in self._before.items())
        count = sum(kept.numel() for kept in self._before.values())
        return same / count if count else 0.0


def _sample(root: nn.Module) -> dict[str, Tensor]:
    """Kept entries of S, and entries of U and V, from all over each."""
    found = {}
    for name, layer in compressed_layers(root).items():
        for part in ("S", "U", "V"):
            flat: Tensor = getattr(layer, part).detach().flatten()
            some = flat[:: max(flat.numel() // SAMPLE, 1) | 1]  # an odd step sees every place of a group
            found[f"{name}.{part}"] = some[some != 0] if part == "S" else some.clone()
    return found


def undone(share: float, dtype: torch.dtype) -> str | None:
    """Say so, if rounding to ``dtype`` undid a training, of which this share of the numbers was left where it was."""
    if share < NOTHING or dtype.itemsize >= torch.float32.itemsize:
        return None
    kind = str(dtype).removeprefix("torch.")
    return f"rounding to {kind} undid the training of {share:.1%} of its numbers"
