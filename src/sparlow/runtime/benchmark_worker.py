"""One model of a benchmark, in a process of its own: its memory is that of this model, and nothing else runs in it.

It reads a request in JSON a line, and answers in one. What libraries print goes to the standard error.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TextIO

import psutil
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from sparlow.errors import InputError, RunError, is_out_of_memory, out_of_memory
from sparlow.machine import machine, peak_memory, reset_peak_memory
from sparlow.runtime.ends import PackedEmbedding
from sparlow.runtime.options import FEWER, RunningOptions
from sparlow.runtime.packed import PackedLinear, PackedModule
from sparlow.runtime.running import Clock, Running, open_to_run
from sparlow.runtime.stepping import Stepping, leave_step, use_step

CHECKED, BEGUN = 32, 8  # tokens of the check, and those of them that are read at once


class Worker:
    """Answers requests about one model."""

    def __init__(self) -> None:
        self._interpreter = psutil.Process().memory_info().rss
        self._running: Running | None = None
        self._stepping: Stepping | None = None

    def open(self, name: str, threads: int | None, **options: Any) -> dict[str, Any]:  # noqa: ANN401 - of RunningOptions
        """Open the model; say what of its bytes a token reads."""
        if threads:
            torch.set_num_threads(threads)
        self._running = open_to_run(name, RunningOptions(step="transformers", **options))
        model = self._model
        self._stepping = Stepping(model)
        self._stepping.ready()
        found = {"bytes_read": bytes_read(model), "no_step": self._stepping.why_not, "machine": machine()}
        found["rounds"] = any(isinstance(m, PackedLinear) and m.rounds for m in model.modules())
        return {"interpreter": self._interpreter, **found}

    @property
    def _model(self) -> PreTrainedModel:
        if self._running is None:
            raise RunError("No model has been opened.")
        return self._running.model

    def _step_by(self, step: str) -> None:
        leave_step(self._model)
        if step == "kernel":
            self._stepping = use_step(self._model, self._stepping)

    def run(self, step: str, batch: int, prompt: int, tokens: int) -> dict[str, Any]:
        """Write so many tokens behind prompts of so many; say how long that took."""
        self._step_by(step)
        ids = _random_ids(self._model, batch, prompt)
        reset_peak_memory()
        untyped: Any = self._model
        clock = Clock()
        untyped.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, streamer=clock,
            do_sample=False, temperature=None, top_p=None, top_k=None, pad_token_id=0,
        )  # fmt: skip
        rate = clock.rate or 0.0
        return {"first": clock.first, "prefill": batch * prompt / clock.first, "decode": batch * rate} | {
            "peak": peak_memory()["rss"]
        }

    @torch.no_grad()
    def logits(self, step: str, file: str) -> dict[str, Any]:
        """Write the logits behind each of some tokens, all but the first of which are read one by one."""
        self._step_by(step)
        untyped: Any = self._model
        ids = _random_ids(self._model, 1, CHECKED)
        ready = self._stepping.ready() if step == "kernel" and self._stepping else None
        cache = DynamicCache() if ready is None else ready.cache()
        found = [untyped(ids[:, :BEGUN], past_key_values=cache, use_cache=True).logits[0, -1:]]
        found += [
            untyped(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits[0] for i in range(BEGUN, CHECKED)
        ]
        save_file({"logits": torch.cat(found).float().contiguous()}, file)
        return {}

    @torch.no_grad()
    def reference(self, file: str) -> dict[str, Any]:
        """Write what ``logits`` should give, from one pass of the model itself, without the kernel."""
        leave_step(self._model)
        untyped: Any = self._model
        _expand(self._model)
        found = untyped(_random_ids(self._model, 1, CHECKED)).logits[0, BEGUN - 1 :]
        save_file({"logits": found.float().contiguous()}, file)
        return {}


def _expand(model: PreTrainedModel) -> None:
    """Put dense weights in the place of packed ones, in float32, rounded only where packed layers round them."""
    packed = [module for module in model.modules() if isinstance(module, PackedModule)]
    rows = next((module.packed.dtype for module in packed if isinstance(module, PackedEmbedding)), None)
    for module in packed:
        module.packed = replace(module.packed, dtype=torch.float32)
    untyped: Any = model
    if packed:
        untyped.dequantize()
    if rows is not None:  # an embedding rounds the rows that it looks up; a head that is tied to it does not
        embedding = untyped.get_input_embeddings()
        embedding.weight = nn.Parameter(embedding.weight.detach().to(rows).float())


def _random_ids(model: PreTrainedModel, batch: int, tokens: int) -> Tensor:
    untyped: Any = model
    return torch.randint(
        int(untyped.config.get_text_config().vocab_size),
        (batch, tokens),
        generator=torch.Generator().manual_seed(0),
    )


def bytes_read(model: PreTrainedModel) -> int:
    """Return the bytes of weights that a token reads: all but an embedding of which nothing else is made."""
    untyped: Any = model
    embedding: nn.Module = untyped.get_input_embeddings()
    found: dict[int, int] = {}
    for module in model.modules():
        if module is embedding:
            continue
        for tensor in (*module.parameters(recurse=False), *_stored(module)):
            found[tensor.data_ptr()] = tensor.nbytes
    return sum(found.values())


def _stored(module: nn.Module) -> list[Tensor]:
    return [t for t in module.packed.parts.values() if t.numel()] if isinstance(module, PackedModule) else []


def _said(problem: Exception) -> str:
    if is_out_of_memory(problem):
        return out_of_memory(problem, advice=FEWER)
    return str(problem).strip() or type(problem).__name__


def serve(requests: TextIO, answer: Callable[[str], object]) -> None:
    """Answer until there are no more requests."""
    worker = Worker()
    for line in requests:
        request = json.loads(line)
        try:
            said = getattr(worker, request.pop("do"))(**request)
        except (InputError, RunError, OSError, MemoryError, RuntimeError) as problem:
            said = {"error": _said(problem), "input": isinstance(problem, InputError)}
        answer(json.dumps(said))


def main() -> None:
    """Serve the process that started this one."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(line: str) -> None:
        answers.write(f"{line}\n")
        answers.flush()

    serve(sys.stdin, answer)


if __name__ == "__main__":
    main()
