"""Runs a model, compressed or dense: opened as serves best, its text as it comes, and how long that took."""

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer
from transformers.generation.streamers import BaseStreamer

from sparlow.errors import InputError, as_input_error
from sparlow.model.artefact.schemes import METHOD
from sparlow.model.loading.place import cannot_open
from sparlow.model.loading.source import (
    find_tokenizer,
    open_model,
    parse_dtype,
    resolve_model_path,
    upcast_for_cpu,
)
from sparlow.runtime.modes import load
from sparlow.runtime.opening import MODE
from sparlow.runtime.options import RunningOptions, TextOptions
from sparlow.runtime.stepping import Stepping, use_step


@dataclass(frozen=True)
class Running:
    """A model that is ready to run.

    Attributes:
        model: It, on the CPU.
        tokenizer: Its own; None if it has none.
        mode: That it was opened in.
        stepping: Decides how each token is computed; None: by transformers.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    mode: str
    stepping: Stepping | None


def open_to_run(name: str, options: RunningOptions) -> Running:
    """Open a model to run it on the CPU.

    Args:
        name: A directory, a hub id or a .gguf file.
        options: How.

    Raises:
        InputError: Nothing usable is there, or a mode is asked for where nothing is compressed.
    """
    where = resolve_model_path(name)
    if is_compressed(where, trust=options.trust_remote_code):
        mode = options.mode or os.environ.get(MODE) or "auto"
        model = load(
            where,
            mode=mode,
            activations=options.activations,
            dtype=parse_dtype(options.dtype),
            trust_remote_code=options.trust_remote_code,
        )
        tokenizer = find_tokenizer(name, where, trust_remote_code=options.trust_remote_code)
    else:
        if options.mode not in (None, "auto", "dense"):
            raise InputError(f"{name} is not compressed, so it cannot be opened {options.mode}. Leave out --mode.")
        mode = "dense"
        opened = open_model(name, dtype=options.dtype, trust_remote_code=options.trust_remote_code)
        model, tokenizer = opened.model, opened.tokenizer
    model = (upcast_for_cpu(model) if options.dtype == "auto" else model).eval()
    return Running(model, tokenizer, mode, use_step(model) if options.step == "kernel" else None)


def is_compressed(where: str, *, trust: bool = False) -> bool:
    """Whether what lies somewhere is a model that sparlow compressed; a file is none."""
    with as_input_error(cannot_open(where)):
        if where.endswith(".gguf"):
            return False
        config = AutoConfig.from_pretrained(where, trust_remote_code=trust)
    quantization = getattr(config, "quantization_config", None)
    return isinstance(quantization, dict) and quantization.get("quant_method") == METHOD


class Clock(BaseStreamer):
    """Notes when each token came.

    Attributes:
        began: When generating began.
        stamps: When the tokens came, of all texts at once, after the prompt.
    """

    def __init__(self) -> None:
        self.began, self.stamps = time.perf_counter(), list[float]()
        self._prompt = True

    def put(self, value: Tensor) -> None:
        """Take the prompt, then token after token."""
        del value
        if self._prompt:
            self._prompt = False
        else:
            self.stamps.append(time.perf_counter())

    def end(self) -> None:
        """Take notice that all is done."""

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.stamps[0] - self.began

    @property
    def rate(self) -> float | None:
        """Tokens a second of one text behind the first; None if there are none."""
        taken = self.stamps[-1] - self.stamps[0]
        return (len(self.stamps) - 1) / taken if taken else None


class _Streamed(TextStreamer):
    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Callable[[str], None], clock: Clock) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show, self._clock = show, clock

    def put(self, value: Tensor) -> None:
        self._clock.put(value)
        super().put(value)  # type: ignore[no-untyped-call]  # untyped there

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._show(f"{text}\n" if stream_end else text)


def stream(running: Running, prompt: str, text: TextOptions, show: Callable[[str], None]) -> Clock:
    """Let a model go on from a text, and show what it says as it comes.

    Args:
        running: The model.
        prompt: The text.
        text: What is wanted.
        show: Takes a few letters at a time.

    Returns:
        When the tokens came.

    Raises:
        InputError: There is no tokenizer or no chat template, or the prompt is empty or too long.
    """
    ids = _ids(running, prompt, chat=text.chat)
    if running.stepping is not None:
        running.stepping.ready()  # found once, and not counted as time of this text
    drawn: dict[str, Any] = {"do_sample": text.temperature > 0}
    if text.temperature > 0:
        drawn |= {"temperature": text.temperature} | ({} if text.top_p is None else {"top_p": text.top_p})
    else:  # what the model says of drawing is of no use, and transformers would say so
        drawn |= {"temperature": None, "top_p": None, "top_k": None}
    clock = Clock()
    streamer = _Streamed(cast("PreTrainedTokenizerBase", running.tokenizer), show, clock)
    untyped: Any = running.model
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        torch.manual_seed(text.seed)
        clock.began = time.perf_counter()
        untyped.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=text.max_tokens, streamer=streamer,
            pad_token_id=_padding(running), **drawn,
        )  # fmt: skip
    return clock


def _ids(running: Running, prompt: str, *, chat: bool) -> Tensor:
    tokenizer: Any = running.tokenizer
    if tokenizer is None:
        raise InputError("The model has no tokenizer. Add the tokenizer's files to its directory.")
    if not chat:
        ids: Tensor = tokenizer(prompt, return_tensors="pt").input_ids
    elif not tokenizer.chat_template:
        raise InputError("The model's tokenizer has no chat template. Leave out --chat.")
    else:
        said = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
            "input_ids"
        ]
    longest = getattr(running.model.config.get_text_config(), "max_position_embeddings", None)
    if not ids.shape[1]:
        raise InputError("The prompt holds no token. Give --prompt some text.")
    if longest and ids.shape[1] >= longest:
        raise InputError(f"The prompt has {ids.shape[1]} tokens, and the model reads {longest}. Give a shorter one.")
    return ids


def _padding(running: Running) -> int:
    untyped: Any = running.tokenizer
    found = (untyped.pad_token_id, untyped.eos_token_id)
    return next((int(token) for token in found if token is not None), 0)
