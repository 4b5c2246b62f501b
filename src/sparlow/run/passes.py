"""Forward passes of a run, block by block: the dense and the compressed model are measured on text."""

import math
from collections.abc import Container, Iterator, Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from sparlow.distributed import ALONE, Processes
from sparlow.errors import InputError
from sparlow.evaluation.agreement import Dense, Measured, Predictions, copy_outside
from sparlow.evaluation.perplexity import behind_all, figures_of
from sparlow.model.forward.activation_store import ActivationStore, place
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
        predictions: Those of the dense model that were kept, by fingerprint of the windows.
    """

    folder: Path | None = None

    def __init__(
        self, opened: OpenedModel, offload: str, clock: Clock, notify: Notify, processes: Processes = ALONE
    ) -> None:
        self.predictions: dict[str, Predictions] = {}
        self._processes = processes
        self._model, self._offload, self._clock, self._notify = opened.model, offload, clock, notify
        self._decoder, self._weights = opened.decoder, opened.weights

    @property
    def dense_blocks(self) -> Iterator[nn.Module]:
        """The dense blocks, one at a time."""
        return one_by_one(self._weights, len(self._decoder))

    def recorded(self, windows: Tensor, micro_batch: int, apart: int = 0, *, trained: bool = False) -> Recording:
        """Return the inputs of the blocks for these windows, see ``capture_block_inputs``.

        ``trained`` says that blocks are trained on them, see ``activation_store.place``.
        """
        with self._weights.outside_blocks(), self._weights.block(0):
            numbers = windows.numel() * self._carried // self._processes.size
            size = numbers * self._weights.computing.itemsize
            where: torch.device | str | Path = place(
                self._offload, size, self._weights.device, self.folder, trained=trained
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
    def measure(self, stage: str, windows: Tensor, parts: Weights, *, keep: bool = False) -> Measured:
        """Measure the model with the weights ``parts``, beside the dense one if its predictions were kept.

        Args:
            stage: What the progress bar shows.
            windows: (n, seqlen) token ids.
            parts: What is measured.
            keep: They are the dense model's, whose predictions are kept.
        """
        advance = counting(self._notify, stage, len(self._decoder) + 1)
        text = text_fingerprint(windows)
        with self._clock("evaluate"):
            at_once = windows_at_once(windows.shape[1], unfused_heads(self._model.config.get_text_config()))
            recording = self.recorded(windows, at_once * self._processes.size)
            hidden = behind_all(recording, parts, advance)
            if keep:
                with parts.outside_blocks():
                    self.predictions[text] = Predictions.of(self._model, recording.output, recording.ids, _kept(hidden))
            found = self._at_head(recording, hidden, parts, None if keep else self.predictions.get(text))
            advance(1)
        return found

    def _at_head(
        self, recording: Recording, hidden: ActivationStore, parts: Weights, known: Predictions | None
    ) -> Measured:
        """Measure from the states behind the last block; the dense model's head may be another than that of ``parts``.

        Without that head there is no agreement.
        """
        with parts.outside_blocks():
            if known is None or known.has_head(self._model):
                return self._measured(recording, hidden, Dense(self._model, known) if known else None)
        with self._weights.outside_blocks():
            own = copy_outside(self._model)
            dense = Dense(own, known) if known.has_head(own) else None
        with parts.outside_blocks():
            return self._measured(recording, hidden, dense)

    def _measured(self, recording: Recording, hidden: ActivationStore, dense: Dense | None) -> Measured:
        figures = figures_of(self._model, recording, hidden, dense)
        return Measured(
            figures.perplexity(self._processes), None if dense is None else figures.agreement(self._processes)
        )

    def dense(
        self,
        evaluation: Mapping[str, Tensor],
        known: dict[str, Perplexity],
        warnings: list[str],
        compared: Container[str] = (),
    ) -> dict[str, Perplexity]:
        """Measure the dense model before it is compressed, and check that it is sane.

        Args:
            evaluation: Token windows (n, seqlen) by name.
            known: Perplexities on record, by fingerprint of the windows. New ones are added.
            warnings: Takes a sentence for each name on which the model is no better than chance.
            compared: Names on which the compressed model is still to be measured. The dense model's predictions on
                them are kept, or found again where an earlier part of the run had them.

        Raises:
            InputError: A perplexity is not a number. The message says what is damaged.
        """
        found = {}
        for name, windows in evaluation.items():
            text = text_fingerprint(windows)
            if text not in known:
                keep = name in compared
                known[text] = self.measure("dense perplexity", windows, self._weights, keep=keep).perplexity
            elif name in compared and text not in self.predictions:
                self.measure("dense predictions", windows, self._weights, keep=True)
            found[name] = known[text]
            value = found[name].value
            if math.isnan(value):
                size = self._processes.size  # each looks at the same window
                name_what_is_not_finite(
                    self._decoder, self.dense_blocks, self.recorded(windows[:1].repeat(size, 1), size)
                )
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


def _kept(hidden: ActivationStore) -> ActivationStore:
    """Return states that will wait for the whole run: on an accelerator there is better use for the room."""
    return hidden if hidden.on_disk else ActivationStore("cpu", hidden)
