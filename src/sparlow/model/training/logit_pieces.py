"""A sum over tokens whose terms need logits, a few tokens at a time, with its gradient.

Logits of a batch take batch × tokens × vocabulary numbers, and a loss takes several times as many for its gradient. So
each piece gives its gradient to what leaves the blocks at once, and no two pieces are in memory together.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PIECES = 4  # for each that is in memory at once elsewhere: here there are gradients


class _WithGradient(torch.autograd.Function):
    """A number whose gradient is known already."""

    @staticmethod
    def forward(ctx: Any, _at: Tensor, value: Tensor, gradient: Tensor) -> Tensor:  # noqa: ANN401 - torch's
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401 - torch's
        (gradient,) = ctx.saved_tensors
        return outer[0] * gradient, None, None


def summed_in_pieces(left: Tensor, size: int, part: Callable[[Tensor, slice], Tensor], count: float | Tensor) -> Tensor:
    """Return the sum of what ``part`` finds for all tokens, divided by ``count``.

    Args:
        left: (b, n, …) what leaves the blocks.
        size: Tokens of each of the b windows in a piece.
        part: Of a piece (b, at most size, …) and where its tokens are, the sum over these.
        count: What the sum is divided by; only in the end, for half precision would lose so small a gradient.
    """
    total = torch.zeros((), device=left.device)
    wanted = left.requires_grad and torch.is_grad_enabled()
    gradient = torch.zeros_like(left, requires_grad=False) if wanted else None
    for start in range(0, left.shape[1], size):
        at = slice(start, start + size)
        piece = left[:, at].detach().requires_grad_(wanted)
        found = part(piece, at)
        if gradient is not None and found.requires_grad:
            found.backward()
            if piece.grad is not None:
                gradient[:, at] = piece.grad
        total = total + found.detach()
    if gradient is None:
        return total / count
    whole: Tensor = _WithGradient.apply(left, total / count, gradient / count)  # type: ignore[no-untyped-call]
    return whole
