"""Fused experts in a twin without weights, whose routers have no values by which to choose."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sparlow.model.forward.compressible import compressible, experts_apart, fused_of
from sparlow.model.forward.fused import FusedWeight
from sparlow.model.forward.fused_layout import caller_of


def show_one_expert(block: nn.Module) -> None:
    """Let every module that calls experts call the first of each, in order, on all tokens.

    Nothing else of what the module computes is left, so this is for a model that is thrown away.

    Args:
        block: Of a model on the meta device; its experts are taken apart.
    """
    experts_apart(block, compressible(block))
    callers: dict[str, dict[str, FusedWeight]] = {}
    for name, fused in fused_of(block).items():
        owner = name.rpartition(".")[0]
        callers.setdefault(caller_of(owner, fused.layout), {})[name] = fused
    for name, weights in callers.items():
        caller: Any = block.get_submodule(name)
        caller.forward = _forward(weights)


def _forward(weights: Mapping[str, FusedWeight]) -> Any:  # noqa: ANN401 - a forward of any arguments
    def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:  # noqa: ANN401 - a router's choice
        y = x
        for fused in weights.values():
            if fused.layout.routed:
                y = fused.layer(0)(x)
                continue
            features = fused.matrix[0 if fused.layout.transposed else 1]
            y = fused.layer(0)(y[..., :1].expand(*y.shape[:-1], features).clone())
        return y

    return forward
