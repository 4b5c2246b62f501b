"""The likeliest token, again and again, by the kernel's step: ``generate`` where nothing else is asked for.

transformers' own loop takes some milliseconds a token, a fifth of the time of a small model.
"""

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

if TYPE_CHECKING:
    from sparlow.runtime.step import Step

_GIVEN = {"input_ids", "inputs", "attention_mask", "generation_config", "streamer"}  # beside fields of the config
_USED = {"max_new_tokens", "min_new_tokens", "eos_token_id", "pad_token_id"}
_IDLE = {
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
    "bos_token_id",
    "use_cache",
    "max_length",
    "transformers_version",
}
_ONE_IS_OFF = {
    "num_beams",
    "num_return_sequences",
    "repetition_penalty",
    "length_penalty",
    "typical_p",
    "guidance_scale",
}


@dataclass(frozen=True)
class Greedy:
    """What is wanted.

    Attributes:
        ids: Of the prompts (texts, tokens), all of which count.
        most: New tokens at most.
        least: So many before one that ends a text.
        ends: Tokens that end a text.
        padding: The token behind the end of a text, if others go on.
        streamer: What is given the tokens as they come, or None.
    """

    ids: Tensor
    most: int
    least: int
    ends: Tensor
    padding: int
    streamer: Any


def greedy(model: PreTrainedModel, args: tuple[object, ...], asked: Mapping[str, Any]) -> Greedy | None:
    """Return what a call of ``generate`` wants; None if that is more than the likeliest tokens behind whole prompts."""
    own: Any = model
    config = copy.deepcopy(asked.get("generation_config") or own.generation_config)
    ids = asked.get("input_ids", asked.get("inputs")) if not args else args[0]
    fields = {name: value for name, value in asked.items() if name not in _GIVEN}
    if len(args) > 1 or not isinstance(config, GenerationConfig) or not isinstance(ids, Tensor) or ids.ndim != 2:  # noqa: PLR2004 - texts, tokens
        return None
    if config.update(**fields) or config.do_sample or any(_counts(*item) for item in config.to_diff_dict().items()):
        return None
    mask = asked.get("attention_mask")
    if config.max_new_tokens is None or (mask is not None and not bool(mask.all())) or config.use_cache is False:
        return None
    if mask is None and config.pad_token_id is not None and bool((ids == config.pad_token_id).any()):
        return None  # transformers takes these for padding
    ends = [] if config.eos_token_id is None else torch.tensor(config.eos_token_id).reshape(-1).tolist()
    padding = next((int(t) for t in (config.pad_token_id, *ends) if t is not None), 0)
    least, wanted = config.min_new_tokens or 0, torch.tensor(ends, dtype=torch.long)
    return Greedy(ids, int(config.max_new_tokens), least, wanted, padding, asked.get("streamer"))


def _counts(name: str, value: object) -> bool:
    """Whether a field that has not its default changes what the likeliest tokens are, or what is returned."""
    if name.startswith("_") or name in _USED or name in _IDLE or value is None or value is False:
        return False
    return not (name in _ONE_IS_OFF and value == 1)


@torch.no_grad()
def write(model: PreTrainedModel, step: "Step", wanted: Greedy) -> Tensor:
    """Return prompts and new tokens (texts, tokens), as ``generate`` does."""
    cache, ids = step.cache(), wanted.ids
    found, going = [ids], torch.ones(len(ids), dtype=torch.bool)
    if wanted.streamer is not None:
        wanted.streamer.put(ids)
    logits = _first(model, ids, cache)
    for i in range(wanted.most):
        if i < wanted.least:
            logits[:, wanted.ends] = -torch.inf
        token = logits.argmax(-1).masked_fill(~going, wanted.padding)
        found.append(token[:, None])
        if wanted.streamer is not None:
            wanted.streamer.put(token)
        if len(wanted.ends):
            going &= (token[:, None] != wanted.ends).all(1)
        if i + 1 == wanted.most or not going.any():
            break
        logits = step(token[:, None], cache)
    if wanted.streamer is not None:
        wanted.streamer.end()
    return torch.cat(found, 1)


def _first(model: PreTrainedModel, ids: Tensor, cache: object) -> Tensor:
    """Return the logits (texts, vocabulary) behind the prompts."""
    own: Any = model
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(type(model).forward).parameters else {}
    found: Tensor = own(input_ids=ids, past_key_values=cache, use_cache=True, **last).logits[:, -1]
    return found.float()
