"""A few of the tokens that a layer reads, each at length one: an error in which every token counts by its own size.

In some layers a handful of tokens is a thousand times as large as the others and holds nearly all of tr(W H Wᵀ). There
the error relative to H says nothing of the ordinary tokens.
"""

import torch
from torch import Tensor

from sparlow.linalg.shared_rows import summed

KEPT = 256  # tokens at least, if there are so many, and fewer than twice as many
GOLDEN = 0.6180339887498949  # multiples of it, without their whole part, fall everywhere in [0, 1) alike


class TokenSample:
    """Keep a bounded number of tokens of a stream, evenly spread over it and over the positions of its windows.

    Args:
        features: Width of a token.
        device: Where they are kept.
    """

    def __init__(self, features: int, device: torch.device) -> None:
        self.rows = torch.empty(0, features, device=device)  # of length one
        self._places = torch.empty(0, dtype=torch.float64)  # in [0, 1), of each
        self._share = 1.0  # of the tokens that are kept: those whose place lies below
        self._seen = 0

    def add(self, x: Tensor) -> None:
        """Take in the tokens ``x`` (tokens, features)."""
        places = torch.arange(self._seen, self._seen + len(x), dtype=torch.float64).mul_(GOLDEN).frac_()
        self._seen += len(x)
        chosen = (places < self._share).nonzero().squeeze(1)
        rows = x[chosen.to(x.device)].float()
        rows = torch.nan_to_num(rows / rows.norm(dim=1, keepdim=True))  # a token of zeros stays one
        self._places = torch.cat((self._places, places[chosen]))
        self.rows = torch.cat((self.rows, rows.to(self.rows.device)))
        while len(self.rows) >= 2 * KEPT:
            self._share /= 2
            chosen = (self._places < self._share).nonzero().squeeze(1)
            self._places, self.rows = self._places[chosen], self.rows[chosen.to(self.rows.device)]


def error_per_token(rows: Tensor, W: Tensor, residual: Tensor) -> float:
    """Σ |R x|² / Σ |W x|² over tokens x of length one; 0 where the layer's output is zero.

    Args:
        rows: (tokens, in).
        W: (out, in).
        residual: R (out, in).
    """
    whole, left = (summed((rows @ part.T).double().square().sum().item()) for part in (W, residual))
    return left / whole if whole > 0 else 0.0
