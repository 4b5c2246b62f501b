"""One run: measure the dense model, walk its blocks, write, measure again, report."""

from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparlow.allocation import Budget, owl_densities
from sparlow.errors import InputError
from sparlow.evaluation import perplexity
from sparlow.journal import Journal
from sparlow.linalg.patterns import Unstructured
from sparlow.model.blocks import Call, decoder_blocks, linears, not_compressed, run_block
from sparlow.model.checkpoint import CheckpointWriter, load, read_block
from sparlow.model.layers import compressed_layers
from sparlow.model.quantizer import attach
from sparlow.model.recording import Recording, record
from sparlow.model.source import OpenedModel, for_computing
from sparlow.model.storage import Storage
from sparlow.page import write_reports
from sparlow.pipeline import budgets, compress_block, name_what_is_not_finite, outlier_shares
from sparlow.progress import Clock, Notify, Progress
from sparlow.recipe import Recipe
from sparlow.report import LayerRecord, Report, peak_memory, reset_peak_memory
from sparlow.text import fingerprint as text_fingerprint

MICRO_BATCH_TOKENS = 4096  # tokens that pass through a block at a time


class Job:
    """One compression from the checks to the report; writes only after ``write_to``.

    Args:
        opened: The dense model, which is compressed in place.
        storage: The types of the result's weights.
        recipe: What to do.
        windows: Calibration token ids (samples, seqlen) int64.
        notify: Called after every step.

    Raises:
        InputError: A layer does not fit the recipe.
    """

    def __init__(self, opened: OpenedModel, storage: Storage, recipe: Recipe, windows: Tensor, notify: Notify) -> None:
        self.opened, self.recipe, self.windows, self.notify = opened, recipe, windows, notify
        self.storage = storage
        self.model = opened.model
        self.blocks_name, self.blocks = decoder_blocks(self.model)
        self.budgets = budgets(self.blocks_name, self.blocks, recipe)
        self.clock = Clock()
        self.report = Report(recipe=recipe.to_dict(), model=opened.name)
        self.report.bytes = {"dense": self.storage.bytes_of(self.model), "linears_dense": 0, "linears_compressed": 0}
        self.known_dense: dict[str, float] = {}  # perplexity by fingerprint of the windows
        self.allocated: dict[str, Budget] = {}  # those of the budgets that the data decided
        self.journal: Journal | None = None
        self.writer: CheckpointWriter | None = None

    def write_to(self, folder: Path, *, overwrite: bool) -> None:
        """Write shards and records to ``folder`` as the run proceeds, going on from what is there.

        Raises:
            InputError: ``folder`` holds another run.
        """
        decides = {
            "recipe": self.recipe.to_dict(),
            "model": self.opened.fingerprint,
            "calibration": text_fingerprint(self.windows),
            "version": version("sparlow"),
        }
        self.journal = Journal(folder, decides, self.blocks_name, overwrite=overwrite)
        self.known_dense |= self.journal.dense

    def go(self, evaluation: Mapping[str, Tensor]) -> Report:
        """Do what is not done yet; ``evaluation`` names token windows (n, seqlen) to measure perplexity on."""
        if self.journal and self.journal.finished:
            return self.measured_again(self.journal, evaluation)
        reset_peak_memory()
        if self.journal:
            self.clock.add(self.journal.seconds)
        with self.clock("total"):
            self.measure_dense(evaluation)
            self.walk()
            attach(self.model)
            self.finish_files()
            for name, windows in evaluation.items():
                value = self.perplexity("compressed perplexity", windows, self.model)
                self.report.compressed["perplexity"][name] = value
        self.complete_report()
        if self.journal:
            write_reports(self.report, self.journal.folder)
            measured = self.report.compressed["perplexity"]
            self.journal.finish({text_fingerprint(windows): measured[name] for name, windows in evaluation.items()})
        return self.report

    def measured_again(self, journal: Journal, evaluation: Mapping[str, Tensor]) -> Report:
        """The report of a finished run, with perplexities on this text: as recorded, or measured now and recorded."""
        report = self.report = Report.from_file(journal.folder / "report.json")
        report.dense["perplexity"], report.compressed["perplexity"] = {}, {}
        self.measure_dense(evaluation)
        known = journal.compressed
        model = None
        for name, windows in evaluation.items():
            text = text_fingerprint(windows)
            if text not in known:
                model = model or self.loaded(journal.folder)
                known[text] = self.perplexity("compressed perplexity", windows, model)
            report.compressed["perplexity"][name] = known[text]
        if model is not None:
            write_reports(report, journal.folder)
            journal.finish(known)
        return report

    def loaded(self, folder: Path) -> PreTrainedModel:
        """The finished result, where the dense model lies."""
        model: Any = for_computing(load(folder))
        compressed: PreTrainedModel = model.to(self.model.device)
        return compressed

    def measure_dense(self, evaluation: Mapping[str, Tensor]) -> None:
        """The sanity gate: a number for the model as it came, before any number for what becomes of it."""
        for name, windows in evaluation.items():
            text = text_fingerprint(windows)
            value = self.known_dense.get(text) or self.perplexity("dense perplexity", windows, self.model)
            self.known_dense[text] = value
            if value != value:  # noqa: PLR0124 - NaN
                recording = record(self.model, windows[:1], micro_batch=1)
                name_what_is_not_finite(self.blocks_name, self.blocks, recording.calls, recording.hidden)
                raise InputError("The dense model's perplexity is not a number: its head or embedding is damaged.")
            if value > self.model.config.get_text_config().vocab_size:
                self.report.warnings.append(
                    f"the dense model is no better than chance on {name}: perplexity {value:.0f}"
                )
            self.report.dense["perplexity"][name] = value

    def perplexity(self, stage: str, windows: Tensor, model: PreTrainedModel) -> float:
        """Measure and count the time; ``stage`` is what the progress bar says."""
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            self.notify(Progress(stage, done, len(windows)))

        with self.clock("evaluate"):
            return perplexity(model, windows, advance)

    @torch.no_grad()
    def walk(self) -> None:
        """Compress block after block, each fed by the compressed ones before it."""
        with self.clock("walk"):
            micro_batch = max(MICRO_BATCH_TOKENS // self.windows.shape[1], 1)
            recording = record(self.model, self.windows, micro_batch=micro_batch)
        self.allocate(recording)
        hidden = recording.hidden
        if self.journal:
            self.journal.begin(self.known_dense, {n: b.to_dict() for n, b in self.allocated.items()})
            self.writer = CheckpointWriter(
                self.journal.folder,
                self.model,
                self.blocks_name,
                len(self.blocks),
                dtype=self.storage.dtype,
                kept=self.storage.exceptions,
            )
        for i, block in enumerate(self.blocks):
            dense = {name: self.storage.bytes_of(linear) for name, linear in linears(block).items()}
            if self.journal and i < self.journal.blocks_done:
                layers = self.restored(i, block, self.journal)
            else:
                layers = self.compressed(i, block, recording.calls[i], hidden)
            self.report.layers += layers
            self.report.bytes["linears_dense"] += sum(dense[layer.name] for layer in layers)
            self.report.bytes["linears_compressed"] += sum(
                map(self.storage.packed_bytes, compressed_layers(block).values())
            )
            if i + 1 == len(self.blocks):  # nobody reads what leaves the last block
                hidden = []
            with self.clock("walk"):
                hidden = [run_block(block, x, recording.calls[i][len(x)]).to(x.device) for x in hidden]
            self.notify(Progress("blocks", i + 1, len(self.blocks)))

    def allocate(self, recording: Recording) -> None:
        """Let the data decide on the budgets, where the recipe wants it, unless an earlier part of the run did."""
        if self.recipe.allocate == "uniform":
            return
        if self.journal and self.journal.allocation:
            self.allocated = {name: Budget.from_dict(data) for name, data in self.journal.allocation.items()}
        else:
            self.allocated = self.outlier_weighed(recording)
        self.budgets |= self.allocated

    def outlier_weighed(self, recording: Recording) -> dict[str, Budget]:
        """The budgets by OWL, of the layers to which no rule gives a pattern."""

        def advance(done: int) -> None:
            self.notify(Progress("allocation", done, len(self.blocks)))

        with self.clock("statistics"):
            shares = outlier_shares(
                self.blocks_name, self.blocks, recording.calls, recording.hidden, self.recipe.owl_threshold, advance
            )
        densities = owl_densities(shares, self.recipe.sparsity, self.recipe.owl_spread)
        patterns = [Unstructured(round(1 - density, 12)) for density in densities]
        names = {f"{self.blocks_name}.{i}.{name}": i for i, block in enumerate(self.blocks) for name in linears(block)}
        free = [name for name in names if name in self.budgets and not self.recipe.rules_pattern(name)]
        return {name: Budget(patterns[names[name]], self.budgets[name].rank) for name in free}

    def restored(self, i: int, block: nn.Module, journal: Journal) -> list[LayerRecord]:
        """Take a block that an earlier run finished from its shard; return its records."""
        journal.check_shard(i)
        read_block(journal.folder, self.blocks_name, i, block)
        block.to(self.model.dtype)
        return journal.layers(i)

    def compressed(
        self, i: int, block: nn.Module, calls: Mapping[int, Call], hidden: list[Tensor]
    ) -> list[LayerRecord]:
        """Compress a block and, if there is a directory, write it."""

        def on_layer(layer: LayerRecord) -> None:
            self.notify(Progress("blocks", i, len(self.blocks), layer))

        layers = compress_block(
            block,
            (self.blocks_name, i),
            calls,
            hidden,
            self.recipe,
            self.budgets,
            self.storage.dtype,
            self.clock,
            on_layer,
        )
        if self.journal and self.writer:
            with self.clock("save"):
                shard = self.writer.write_block(i, block)
            self.journal.note_block(shard, layers, self.clock.so_far())
        return layers

    def finish_files(self) -> None:
        """Write what lies outside of the blocks and the files that make the directory a model."""
        if self.journal and self.writer:
            with self.clock("save"):
                rest = self.writer.write_rest(self.model)
                self.writer.finish(self.model, self.opened.tokenizer)
                self.journal.note_rest(rest, self.recipe.to_toml())

    def complete_report(self) -> None:
        """Add up what the layers and the clock say."""
        report = self.report
        report.add_up()
        report.seconds, report.peak_memory = self.clock.seconds, peak_memory()
        names = {layer: f"{self.blocks_name}.{layer.block}.{layer.name}" for layer in report.layers}
        report.warnings += [f"{names[layer]}: {warning}" for layer in report.layers for warning in layer.warnings]
        report.not_compressed = [asdict(row) for row in not_compressed(self.model, names.values())]
