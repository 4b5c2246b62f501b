"""Forward passes of a run, block by block: perplexities of the dense and of the compressed model."""

import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from sparlow.distributed import ALONE, Processes
from sparlow.errors import InputError
from sparlow.evaluation.perplexity import perplexity_by_blocks
from sparlow.model.forward.activation_store import place
from sparlow.model.forward.attention import unfused_heads, windows_at_once
from sparlow.model.forward.capture import Recording, capture_block_inputs
from sparlow.model.forward.chain_check import carried
from sparlow.model.loading.source import OpenedModel
from sparlow.model.loading.weights import Weights, one_by_one
from sparlow.progress import Clock, Notify, counting
from sparlow.report.records import Perplexity
from sparlow.run.pipeline import name_what_is_not_finite
from sparlow.text import fingerprint as text_fingerprint


class BlockwiseRunner:
    """Runs text through a model block by block, with weights that may stay on disk.

    Args:
        opened: The dense model.
        offload: Where hidden states are kept between blocks: auto, cpu or disk.
        clock: Counts "evaluate".
        notify: Called after every step.
        processes: The processes that divide the text.

    Attributes:
        folder: Where hidden states lie that are kept on disk; None for the system's folder for temporary files.
    """

    folder: Path | None = None

    def __init__(
        self, opened: OpenedModel, offload: str, clock: Clock, notify: Notify, processes: Processes = ALONE
    ) -> None:
        self._processes = processes
        self._model, self._offload, self._clock, self._notify = opened.model, offload, clock, notify
        self._decoder, self._weights = opened.decoder, opened.weights

    @property
    def dense_blocks(self) -> Iterator[nn.Module]:
        """The dense blocks, one at a time."""
        return one_by_one(self._weights, len(self._decoder))

    def recorded(self, windows: Tensor, micro_batch: int, apart: int = 0) -> Recording:
        """Return the inputs of the blocks for these windows, see ``capture_block_inputs``."""
        with self._weights.outside_blocks(), self._weights.block(0):
            numbers = windows.numel() * self._carried // self._processes.size
            where: torch.device | str | Path = place(
                self._offload, numbers * self._weights.computing.itemsize, self._weights.device, self.folder
            )
            if where == "disk" and self.folder:
                where = self.folder
            return capture_block_inputs(
                self._model, windows, micro_batch=micro_batch, apart=apart, place=where, processes=self._processes
            )

    @cached_property
    def _carried(self) -> int:
        """Numbers of a token in a copy of the hidden states; what is around the blocks must be there, and the first."""
        return carried(self._model)

    @torch.no_grad()
    def perplexity(self, stage: str, windows: Tensor, parts: Weights) -> Perplexity:
        """Return the perplexity of the model with the weights ``parts``; the progress bar shows ``stage``."""
        advance = counting(self._notify, stage, len(self._decoder) + 1)
        with self._clock("evaluate"):
            at_once = windows_at_once(windows.shape[1], unfused_heads(self._model.config.get_text_config()))
            recording = self.recorded(windows, at_once * self._processes.size)
            return perplexity_by_blocks(self._model, recording, parts, advance, self._processes)

    def dense(
        self, evaluation: Mapping[str, Tensor], known: dict[str, Perplexity], warnings: list[str]
    ) -> dict[str, Perplexity]:
        """Measure the dense model before it is compressed, and check that it is sane.

        Args:
            evaluation: Token windows (n, seqlen) by name.
            known: Perplexities on record, by fingerprint of the windows. New ones are added.
            warnings: Takes a sentence for each name on which the model is no better than chance.

        Raises:
            InputError: A perplexity is not a number. The message says what is damaged.
        """
        found = {}
        for name, windows in evaluation.items():
            text = text_fingerprint(windows)
            known[text] = found[name] = known.get(text) or self.perplexity("dense perplexity", windows, self._weights)
            value = found[name].value
            if math.isnan(value):
                name_what_is_not_finite(self._decoder, self.dense_blocks, self.recorded(windows[:1], 1))
                raise InputError(
                    "The dense model's perplexity is not a number, so its head or embedding is damaged. "
                    "Fetch the model anew."
                )
            if value > self._model.config.get_text_config().vocab_size:
                warnings.append(
                    f"The dense model is no better than chance on {name} (perplexity {value:.0f}). "
                    "Check that tokenizer and weights belong together."
                )
        return found
