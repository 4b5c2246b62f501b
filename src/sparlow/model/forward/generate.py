"""Calibration text that the model writes itself, for when no data can be used (Williams et al., arXiv 2410.17170)."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from sparlow.errors import InputError
from sparlow.files import cache_folder, replacing

TEMPERATURE = 1.0  # the model's own distribution, neither cut off (top-k, top-p) nor sharpened
AT_ONCE = 32  # windows generated together


def own_windows(
    model: PreTrainedModel,
    *,
    samples: int,
    seqlen: int,
    seed: int,
    fingerprint: str,
) -> Tensor:
    """Return (samples, seqlen) int64 token ids: the beginning-of-text token, then what the model goes on with.

    Every token is drawn at temperature 1 from all tokens but the end-of-text ones, so that each window is full. The
    result is kept in the cache, so that a run that is resumed calibrates on the same text.

    Args:
        model: In eval mode.
        samples: Windows.
        seqlen: Tokens in each, the first included.
        seed: Of the draws; the global generator stays as it is.
        fingerprint: Of the model, to find the windows again.

    Raises:
        InputError: The model has no beginning-of-text token.
    """
    cached = cache_folder() / f"self-{fingerprint[:16]}-{samples}x{seqlen}-{seed}.safetensors"
    if cached.exists():
        return load_file(cached)["windows"]
    start = _beginning(model)
    with torch.random.fork_rng(_devices(model)):
        torch.manual_seed(seed)
        windows = torch.cat([_draw(model, start, count, seqlen) for count in _counts(samples)])
    _keep(windows, cached)
    return windows


def _draw(model: PreTrainedModel, start: int, count: int, seqlen: int) -> Tensor:
    if seqlen == 1:
        return torch.full((count, 1), start)
    untyped: Any = model  # generate is a mixin's
    ids = torch.full((count, 1), start, device=model.device)
    tokens: Tensor = untyped.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        temperature=TEMPERATURE,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        min_new_tokens=seqlen - 1,
        max_new_tokens=seqlen - 1,
        pad_token_id=start,
        use_cache=True,
    )
    return tokens.cpu()


def _beginning(model: PreTrainedModel) -> int:
    config: Any = model.config.get_text_config()
    for source in (model.generation_config, config):
        for name in ("bos_token_id", "decoder_start_token_id", "eos_token_id"):  # some begin a text with its end
            token = getattr(source, name, None)
            token = token[0] if isinstance(token, list) and token else token
            if isinstance(token, int):
                return token
    raise InputError(
        "The model has no beginning-of-text token, so it cannot write its own calibration text. "
        "Give another --calibration."
    )


def _counts(samples: int) -> list[int]:
    return [min(AT_ONCE, samples - done) for done in range(0, samples, AT_ONCE)]


def _devices(model: PreTrainedModel) -> list[int]:
    return [model.device.index or 0] if model.device.type == "cuda" else []


def _keep(windows: Tensor, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as partial:
        save_file({"windows": windows.contiguous()}, partial)
