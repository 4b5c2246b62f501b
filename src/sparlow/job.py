"""One run: measure the dense model, walk its blocks, write, measure again, report."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparlow.allocation import Budget
from sparlow.errors import InputError, RunError
from sparlow.evaluation import perplexity
from sparlow.journal import Journal
from sparlow.model.blocks import Call, decoder_blocks, linears, not_compressed, run_compressed
from sparlow.model.checkpoint import CheckpointWriter, load, read_block
from sparlow.model.layers import compressed_layers
from sparlow.model.matching import PRESETS, Plan, match, round_through
from sparlow.model.quantizer import attach
from sparlow.model.recording import Recording, record
from sparlow.model.source import OpenedModel, for_computing
from sparlow.model.storage import Storage
from sparlow.page import write_reports
from sparlow.pipeline import budgets, compress_block, name_what_is_not_finite, require_finite
from sparlow.progress import Clock, Notify, Progress, counting
from sparlow.recipe import Recipe
from sparlow.report import LayerRecord, Report, peak_memory, reset_peak_memory
from sparlow.survey import Walk, allocated_by_data
from sparlow.text import fingerprint as text_fingerprint

MICRO_BATCH_TOKENS = 4096  # tokens that pass through a block at a time
HELD_OUT = 16  # one calibration window of so many judges the training of a block


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
        require_finite(self.model)
        self.clock = Clock()
        self.report = Report(recipe=recipe.to_dict(), model=opened.name)
        self.report.bytes = {"dense": self.storage.bytes_of(self.model), "linears_dense": 0, "linears_compressed": 0}
        self.plan = plan_of(recipe)
        self.held_out = len(windows) // HELD_OUT if recipe.match and self.plan.patience else 0
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
                self.report.compressed["perplexity"][name] = self.perplexity_after(name, windows, self.model)
        self.complete_report()
        if self.journal:
            write_reports(self.report, self.journal.folder)
            measured = self.report.compressed["perplexity"]
            found = {text_fingerprint(windows): measured[name] for name, windows in evaluation.items()}
            self.journal.finish(self.known_dense, found)
        return self.report

    def measured_again(self, journal: Journal, evaluation: Mapping[str, Tensor]) -> Report:
        """The report of a finished run, with perplexities on this text: as recorded, or measured now and recorded."""
        whole = Report.from_file(journal.folder / "report.json")
        self.report = replace(whole, dense={"perplexity": {}}, compressed={"perplexity": {}})
        self.measure_dense(evaluation)
        known = journal.compressed
        model = None
        for name, windows in evaluation.items():
            text = text_fingerprint(windows)
            if text not in known:
                model = model or self.loaded(journal.folder)
                known[text] = self.perplexity_after(name, windows, model)
            self.report.compressed["perplexity"][name] = known[text]
        if model is not None:
            for part, new in ((whole.dense, self.report.dense), (whole.compressed, self.report.compressed)):
                part["perplexity"] |= new["perplexity"]  # what was measured before stays on record
            write_reports(whole, journal.folder)
            journal.finish(self.known_dense, known)
        return self.report

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
        with self.clock("evaluate"):
            return perplexity(model, windows, counting(self.notify, stage, len(windows)))

    def perplexity_after(self, name: str, windows: Tensor, model: PreTrainedModel) -> float:
        """Measure the compressed model; RunError if that gives no number."""
        value = self.perplexity("compressed perplexity", windows, model)
        if value != value:  # noqa: PLR0124 - NaN
            raise RunError(f"The compressed model's perplexity on {name} is not a number: use --dtype float32.")
        return value

    @torch.no_grad()
    def walk(self) -> None:
        """Compress block after block, each fed by the compressed ones before it."""
        with self.clock("walk"):
            micro_batch = max(MICRO_BATCH_TOKENS // self.windows.shape[1], 1)
            recording = record(self.model, self.windows, micro_batch=micro_batch, apart=self.held_out)
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
            if self.journal and self.journal.has(i):
                layers, matching = self.restored(i, block, self.journal)
            else:
                layers, matching = self.compressed(i, block, recording.calls[i], hidden)
            self.report.layers += layers
            self.report.matching += matching
            self.report.bytes["linears_dense"] += sum(dense[layer.name] for layer in layers)
            self.report.bytes["linears_compressed"] += sum(
                map(self.storage.packed_bytes, compressed_layers(block).values())
            )
            if i + 1 == len(self.blocks):  # nobody reads what leaves the last block
                hidden = []
            with self.clock("walk"):
                hidden = run_compressed(block, hidden, recording.calls[i], f"{self.blocks_name}.{i}")
            self.notify(Progress("blocks", i + 1, len(self.blocks)))

    def allocate(self, recording: Recording) -> None:
        """Let the data decide on the budgets, where the recipe wants it, unless an earlier part of the run did."""
        if self.recipe.allocate == "uniform":
            return
        if self.journal and self.journal.allocation:
            self.allocated = {name: Budget.from_dict(data) for name, data in self.journal.allocation.items()}
        else:
            advance = counting(self.notify, "allocation", len(self.blocks))
            walk = Walk(self.blocks_name, self.blocks, recording.calls, recording.hidden, advance)
            with self.clock("statistics"):
                self.allocated = allocated_by_data(walk, self.recipe, self.budgets)
        self.budgets |= self.allocated

    def restored(self, i: int, block: nn.Module, journal: Journal) -> tuple[list[LayerRecord], list[dict[str, Any]]]:
        """Take a block that an earlier run finished from its shard; return its records."""
        read_block(journal.folder, self.blocks_name, i, block)
        block.to(self.model.dtype)
        return journal.layers(i), journal.matching(i)

    def compressed(
        self, i: int, block: nn.Module, calls: Mapping[int, Call], hidden: list[Tensor]
    ) -> tuple[list[LayerRecord], list[dict[str, Any]]]:
        """Compress a block, match it if the recipe says so and, if there is a directory, write it."""
        if self.journal and i < self.journal.blocks_done:
            self.report.warnings.append(f"the shard of block {i} was damaged after it was written; it was done again")

        def on_layer(layer: LayerRecord) -> None:
            self.notify(Progress("blocks", i, len(self.blocks), layer))

        layers, targets = compress_block(
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
        matching = [self.matched(i, block, calls, hidden, targets)] if self.recipe.match else []
        if self.journal and self.writer:
            with self.clock("save"):
                shard = self.writer.write_block(i, block)
            self.journal.note_block(shard, layers, matching, self.clock.so_far())
        return layers, matching

    def matched(
        self, i: int, block: nn.Module, calls: Mapping[int, Call], hidden: list[Tensor], targets: list[Tensor]
    ) -> dict[str, Any]:
        """Train a compressed block towards its targets, rounded as it will be stored; return the row for the report."""
        label = f"{self.blocks_name}.{i}"
        with self.clock("matching"):
            seed, apart = self.recipe.seed + i, int(self.held_out > 0)
            found = match(block, calls, hidden, targets, self.plan, held_out=apart, seed=seed, label=label)
            kept = [name.removeprefix(f"{label}.") for name in self.storage.exceptions]
            round_through(block, self.storage.dtype, kept)
        return {"block": i, **asdict(found)}

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


def plan_of(recipe: Recipe) -> Plan:
    """The preset of matching, with what the recipe says otherwise."""
    preset = PRESETS[recipe.match_preset]
    return replace(
        preset,
        epochs=recipe.match_epochs or preset.epochs,  # none of these may be 0
        lr=recipe.match_lr or preset.lr,
        batch=recipe.match_batch or preset.batch,
    )
