"""Tell a causal language model from others that transformers opens as one: no token may change what was before it."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from sparlow.errors import InputError, is_out_of_memory
from sparlow.model.forward.block_pass import from_block, hidden_state
from sparlow.model.forward.calls import Given
from sparlow.model.forward.decoder import Decoder
from sparlow.model.forward.stand_ins import run_with_stand_ins

TOKENS = 8  # few, so that one of them weighs much in an attention over all
ROUNDING, ROUNDING_OF_HALF = 1e-4, 1e-2  # of the largest number; without a mask a token changes more than this


def require_decoder_only(config: PreTrainedConfig, name: str) -> None:
    """Raise InputError for an encoder with a decoder, of which a causal language model would be one half."""
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"{name} is no causal language model: its config says that it is an encoder with a decoder "
            f"({config.model_type}). Give a decoder-only model."
        )


@torch.no_grad()
def require_causal(model: PreTrainedModel, name: str, *, first_block: bool = False) -> None:
    """Raise InputError if the last token of a text changes what a model says of the tokens before it.

    Args:
        model: In eval mode.
        name: What the user called it.
        first_block: Only what is in front of the blocks and the first one have weights; they decide.
    """
    require_decoder_only(model.config, name)
    ids = _two_texts(model).to(next(model.get_input_embeddings().parameters()).device)
    try:
        states = _around_first_block(model, ids) if first_block else [_logits(model, ids)]
    except Exception as error:  # a foreign forward may fail in any way; the run then says where and why
        if is_out_of_memory(error):
            raise
        return
    for state in states:
        tolerance = ROUNDING_OF_HALF if state.dtype in (torch.float16, torch.bfloat16) else ROUNDING
        before = state[:, :-1].float()
        if (before[0] - before[1]).abs().max() > tolerance * before.abs().max():
            raise InputError(
                f"{name} is no causal language model: the last token of a text changes what it says of those before "
                "it, so a perplexity would mean nothing. Give a decoder-only model."
            )


def _two_texts(model: PreTrainedModel) -> Tensor:
    """Token ids (2, TOKENS) that differ in the last one; none has a meaning of its own, as an image's has."""
    config = model.config.get_text_config()
    special = {v for part in (model.config, config) for key, v in vars(part).items() if key.endswith("token_id")}
    plain = [i for i in range(config.vocab_size) if i not in special][-TOKENS - 1 :]
    plain = (plain * (TOKENS + 1))[: TOKENS + 1]  # where there are fewer
    return torch.tensor([plain[:TOKENS], [*plain[: TOKENS - 1], plain[TOKENS]]])


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    untyped: Any = model
    logits: Tensor = untyped(ids, use_cache=False).logits
    return logits


def _around_first_block(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """What enters the first block and what leaves it, (2, TOKENS, …) each."""
    decoder = Decoder.of(model)
    forward = decoder.blocks[0].forward
    found: list[Tensor] = []
    output: Any = None

    def answer(i: int, x: Tensor, given: Given) -> Any:  # noqa: ANN401 - what a foreign forward returns
        nonlocal output
        if i == 0:
            axis = next(k for k in range(x.ndim - 1) if x.shape[k : k + 2] == ids.shape)
            output = forward(x, *given[0], **given[1])
            found.extend(from_block(state, axis) for state in (x, hidden_state(output)))
        return output

    run_with_stand_ins(model, decoder, ids, answer, {})
    return found
