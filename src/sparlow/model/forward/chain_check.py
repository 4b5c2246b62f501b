"""See without weights whether the blocks of a model can be replayed one by one, and what the text brings to them."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparlow.errors import InputError, is_out_of_memory
from sparlow.model.forward.arguments import tensors_in
from sparlow.model.forward.decoder import Decoder
from sparlow.model.forward.stand_ins import depends_on_blocks, first_look
from sparlow.model.forward.weightless import TensorWatch

TOKENS = 8  # of each of two windows that pass around the blocks


@dataclass(frozen=True)
class Brought:
    """What a token brings to the blocks, in numbers.

    Attributes:
        hidden: Of its hidden state.
        beside: Of what else the text decides of the blocks' arguments, all blocks together.
    """

    hidden: int
    beside: int


def carried(model: PreTrainedModel) -> int:
    """Return how many numbers a copy of the hidden states has for a token.

    What else the text decides of the blocks' arguments is there once; half of it is counted, as there are two copies at
    least. What cannot be seen is not counted.

    Args:
        model: On the meta device, or with the weights around its blocks and those of the first.
    """
    brought = None
    with suppress(InputError):  # whoever needs a chain says so
        brought = require_chain(model)
    features: int = model.config.get_text_config().hidden_size
    return max(features, brought.hidden + -(-brought.beside // 2)) if brought else features


@torch.no_grad()
def require_chain(model: PreTrainedModel) -> Brought | None:
    """Refuse a model of which it can be seen, also without weights, that its blocks cannot be replayed.

    Args:
        model: On the meta device, or with the weights around its blocks and those of the first.

    Returns:
        What a token brings; None where the model's code does not run without values, so that nothing can be seen. It is
        looked at again when it has weights.

    Raises:
        InputError: Why it cannot be replayed.
    """
    decoder = Decoder.of(model)
    device = next(model.get_input_embeddings().parameters()).device
    ids = torch.zeros(2, TOKENS, dtype=torch.int64, device=device)
    mask = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool, device=device)
    for options in ({"attention_mask": mask}, {}):  # most models look into a mask of their own making
        with _Derived() as of_text, _Derived() as of_blocks:
            of_text.add(ids)
            try:
                look = first_look(model, decoder, ids, options, of_blocks.add)
            except InputError:
                raise
            except Exception as error:  # foreign code that looks at values may fail in any way without them
                if is_out_of_memory(error):
                    raise
                continue
        for i, given in enumerate(look.given):
            for way, tensor in given.items():
                if i and id(tensor) in of_blocks.held:
                    raise InputError(depends_on_blocks(i, way))
        kept = {id(t): t.numel() for given in look.given for t in given.values() if id(t) in of_text.held}
        return Brought(look.hidden.numel() // ids.numel(), sum(kept.values()) // ids.numel())
    return None


class _Derived(TensorWatch):
    """Knows which tensors were computed from some."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, Tensor] = {}  # by id; they are held, so that ids stay what they are

    def add(self, value: Any) -> None:  # noqa: ANN401 - whatever holds tensors
        """Begin with these too."""
        self.held |= {id(tensor): tensor for tensor in tensors_in(value)}

    def saw(self, given: Iterator[Tensor], result: Any) -> None:  # noqa: ANN401 - whatever a function returns
        """See ``TensorWatch``."""
        if any(id(tensor) in self.held for tensor in given):
            self.add(result)
