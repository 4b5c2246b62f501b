"""Calibration text that the model writes itself, for when no data can be used (Williams et al., arXiv 2410.17170)."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
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
    begin: tuple[int, ...] = (),
    kept: bool = True,
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
        begin: Token ids that a text begins with; if there are none, the model's own beginning-of-text token.
        kept: Whether windows begin with these; if not, the model has read them, and windows hold what follows.

    Raises:
        InputError: The model has no beginning-of-text token.
    """
    start = begin or (_beginning(model),)
    if kept and seqlen < len(start):
        raise InputError(
            f"The seqlen must be at least {len(start)}, not {seqlen}: every window begins with as many tokens."
        )
    which = f"{samples}x{seqlen}-{seed}-{'-'.join(map(str, start))}{'' if kept else '-left-out'}"
    file = cache_folder() / f"self-{fingerprint[:16]}-{which}.safetensors"
    cached = _cached(file, model, samples, seqlen, start if kept else ())
    if cached is not None:
        return cached
    length = seqlen if kept else seqlen + len(start)
    with torch.random.fork_rng(_devices(model)):
        torch.manual_seed(seed)
        windows = torch.cat([_draw(model, start, count, length) for count in _counts(samples)])[:, -seqlen:]
    _keep(windows, file)
    return windows


def _cached(file: Path, model: PreTrainedModel, samples: int, seqlen: int, start: tuple[int, ...]) -> Tensor | None:
    """Return what an earlier run wrote; None if there is nothing, or a file that is broken or of something else."""
    embedding: Any = model.get_input_embeddings()
    try:
        windows = load_file(file)["windows"]
    except (OSError, SafetensorError, KeyError):
        return None
    if windows.dtype != torch.int64 or windows.shape != (samples, seqlen):
        return None
    possible = windows.min() >= 0 and windows.max() < embedding.weight.shape[0]
    begun = (windows[:, : len(start)] == torch.tensor(start, dtype=torch.int64)).all()
    return windows if possible and begun else None


def _draw(model: PreTrainedModel, start: tuple[int, ...], count: int, seqlen: int) -> Tensor:
    ids = torch.tensor(start, device=model.device).expand(count, -1).contiguous()
    new = seqlen - len(start)
    if not new:
        return ids.cpu()
    untyped: Any = model  # generate is a mixin's
    tokens: Tensor = untyped.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        temperature=TEMPERATURE,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        min_new_tokens=new,
        max_new_tokens=new,
        pad_token_id=start[0],
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
    """Put windows into the cache, where another run may be doing the same."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".writing-") as scratch:
        own = Path(scratch) / file.name
        with replacing(own) as partial:
            save_file({"windows": windows.contiguous()}, partial)
        own.replace(file)
