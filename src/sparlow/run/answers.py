"""Three prompts, continued by the dense model and by the compressed one: what no number on the page of a run tells.

They cost little, change nothing, and are no part of the run's time or peak of memory. Where there are none, a sentence
says why.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparlow.errors import InputError, first_line
from sparlow.evaluation.texts import require_vocabulary
from sparlow.machine import device_available, free_memory, memory_available
from sparlow.model.loading.source import OpenedModel
from sparlow.model.loading.weights import Weights, all_loaded
from sparlow.progress import Notify, Progress

PROMPTS = ("The capital of France is", "Once upon a time,", "To bake a loaf of bread, first")
TOKENS = 40  # of each answer, at most
ROOM = 1.25  # times the weights: with what is computed beside them


class Answers:
    """The answers of one run.

    Args:
        opened: The dense model.
        notify: Told of each model that has answered.
        alone: Whether no other process shares the run.

    Attributes:
        dense: The dense model's, once it was asked; a comparison of several methods asks it once.
        why: Why there are none.
    """

    def __init__(self, opened: OpenedModel, notify: Notify, *, alone: bool = True) -> None:
        self._opened, self._notify = opened, notify
        self.dense: list[str] = []
        self.why = self._why_not() if alone else "Several processes shared the run, so no prompts were answered."

    def ask_dense(self, weights: Weights) -> None:
        """Let the dense model answer, unless it has already; before it is compressed."""
        if not (self.dense or self.why):
            self.dense = self._ask(weights, 1)

    def record(self, result: Weights) -> dict[str, Any]:
        """Let the compressed model answer; return what ``report.json`` holds."""
        compressed = [] if self.why or not self.dense else self._ask(result, 2)
        rows = [
            {"prompt": prompt, "dense": before, "compressed": after}
            for prompt, before, after in zip(PROMPTS, self.dense, compressed, strict=False)
        ]
        return {"rows": rows, "why": self.why}

    def _why_not(self) -> str:
        model: Any = self._opened.model
        if self._opened.tokenizer is None:
            return "The model came without a tokenizer, so no prompts were answered."
        return "" if model.can_generate() else "The model writes no text by itself, so no prompts were answered."

    def _ask(self, weights: Weights, number: int) -> list[str]:
        """Return the answers; none, and the reason in ``why``, if there is too little memory or the model fails."""
        self.why = self._too_large(weights)
        if self.why:
            return []
        self._notify(Progress("prompts", number - 1, 2))
        try:
            with torch.no_grad(), all_loaded(weights, len(self._opened.decoder)):
                found = self._continued(weights.device)
        except Exception as error:  # noqa: BLE001 - models come with code of their own, and a run of hours goes on
            self.why = f"No prompts were answered, because the model failed: {first_line(error).rstrip('.')}."
            return []
        finally:
            free_memory()
        self._notify(Progress("prompts", number, 2))
        return found

    def _too_large(self, weights: Weights) -> str:
        """Whether all of the model fits in memory at once, for which the run has no need."""
        size = ROOM * weights.computing.itemsize * sum(p.numel() for p in self._opened.model.parameters())
        there = device_available(weights.device) if weights.device.type == "cuda" else memory_available()
        if self._opened.changes or there is None or size <= there:  # what is compressed in place is there already
            return ""
        return (
            f"No prompts were answered: the whole model takes {size / 1e9:.1f} GB of memory, and {there / 1e9:.1f} GB "
            "were free."
        )

    def _continued(self, device: torch.device) -> list[str]:
        """The likeliest token each time, all prompts at once."""
        model: Any = self._opened.model
        tokenizer: Any = self._opened.tokenizer
        pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
        ids, seen = _left_padded([tokenizer(prompt)["input_ids"] for prompt in PROMPTS], pad)
        require_vocabulary(model, ids, "The prompts")  # of an id that is outside, an accelerator would fail for good
        room = _context(model) - ids.shape[1]
        if room < 1:
            raise InputError("It reads fewer tokens than the prompts have.")
        tokens = model.generate(
            ids.to(device), attention_mask=seen.to(device), max_new_tokens=min(TOKENS, room), pad_token_id=pad,
            do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None, repetition_penalty=1.0,
        )  # fmt: skip
        return [tokenizer.decode(row, skip_special_tokens=True) for row in tokens[:, ids.shape[1] :].cpu()]


def _context(model: Any) -> int:  # noqa: ANN401 - a model
    """How many tokens a model reads."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else sys.maxsize  # some say -1 where nothing bounds it


def _left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids (n, longest), and which of them are text."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows])
    seen = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, seen
