"""A model without values: a twin of it on the meta device, and a watch over what its code computes from what."""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparlow.model.forward.arguments import tensors_in

if TYPE_CHECKING:  # transformers imports this file while it is on its way in: see registration.py
    from transformers import PreTrainedModel


def without_weights(model: "PreTrainedModel") -> "PreTrainedModel":
    """Return a copy on the meta device; nothing of the model's own is copied but its structure.

    What its code changes in itself while it runs without values, such as a table that it moves to the device of the
    tokens, the model never sees.
    """
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


class TensorWatch(TorchFunctionMode):
    """Is told of every function of torch that is called inside of it."""

    def saw(self, given: Iterator[Tensor], result: Any) -> None:  # noqa: ANN401 - whatever a function returns
        """Take note of the tensors that a function was given, and of its result."""
        raise NotImplementedError

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401 - torch's signature
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - the same
        result = func(*args, **(kwargs or {}))
        self.saw(tensors_in((args, dict(kwargs or {}))), result)
        return result
