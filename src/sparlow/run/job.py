"""One run: measure the dense model, compress it block by block, write it, measure it again, report."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from sparlow.algorithms import REVISION, revision_of
from sparlow.distributed import ALONE, Processes, on_this_machine
from sparlow.errors import InputError, RunError
from sparlow.evaluation.agreement import Measured
from sparlow.files import HIDDEN, parse_json
from sparlow.machine import reset_peak_memory
from sparlow.model._transformers import require_format
from sparlow.model.artefact.checkpoint import CheckpointWriter, Written, read_block
from sparlow.model.artefact.dtypes import StoredDtypes
from sparlow.model.artefact.hf_quantizer import attach
from sparlow.model.artefact.schemes import FORMAT
from sparlow.model.forward.activation_store import ActivationStore
from sparlow.model.forward.attention import unfused_heads
from sparlow.model.forward.block_pass import BlockPass, pass_through
from sparlow.model.forward.capture import Recording
from sparlow.model.forward.decoder import require_own_weights
from sparlow.model.loading.source import OpenedModel
from sparlow.model.loading.weights import Weights, all_loaded, to_compute
from sparlow.model.training.resume_state import TrainingCheckpoint
from sparlow.progress import RESTORED, Clock, Notify, Progress, counting
from sparlow.recipe.budgets import select, would_take
from sparlow.recipe.recipe import Recipe
from sparlow.recipe.training_plan import last_read
from sparlow.recipe.whole_file import ends_of
from sparlow.report.html_page import write_reports
from sparlow.report.records import LayerRecord, Perplexity, Report, perplexities
from sparlow.run import accounts
from sparlow.run.answers import Answers
from sparlow.run.journal import DISTILLED, Journal
from sparlow.run.model_card import base_card, card, write_model_card
from sparlow.run.passes import BlockwiseRunner
from sparlow.run.pipeline import compress_block
from sparlow.run.recovery import Recovery
from sparlow.run.sensitivity import DenseWalk, allocate_by_data
from sparlow.text import fingerprint as text_fingerprint

if TYPE_CHECKING:
    from sparlow.recipe.allocation import Budget


class Job:
    """One compression from the checks to the report; writes only after ``write_to``.

    Args:
        opened: The dense model, which is compressed in place if it says that it ``changes``.
        storage: The types of the result's weights.
        recipe: What to do.
        windows: Calibration token ids (samples, seqlen) int64.
        notify: Called after every step.
        offload: Where hidden states wait: auto, cpu or disk.
        processes: Those that share the run; the first one writes, and only it tells of progress.

    Raises:
        InputError: A layer does not fit the recipe, or transformers could not open what is written.
    """

    def __init__(
        self,
        opened: OpenedModel,
        storage: StoredDtypes,
        recipe: Recipe,
        windows: Tensor,
        notify: Notify,
        *,
        offload: str = "auto",
        processes: Processes = ALONE,
    ) -> None:
        require_format()
        self.opened, self.recipe, self.processes = opened, recipe, processes
        self.windows = processes.broadcast(
            windows.contiguous()
        )  # text sampled by the model may differ between machines
        self.notify: Notify = notify if processes.first else lambda _: None
        self.storage, self.model, self.clock = storage, opened.model, Clock()
        self.decoder, self.weights = opened.decoder, opened.weights
        self.runner = BlockwiseRunner(opened, offload, self.clock, self.notify, processes)
        require_own_weights(self.model, self.decoder)
        selection = select(self.model, self.decoder, recipe, storage)
        self.budgets, self.stays_dense, self.choosable = dict(selection.budgets), selection.dense, selection.layers
        for name in (name for name, _ in self.model.named_parameters() if name in opened.damaged):
            layer, _, part = name.rpartition(".")
            raise InputError(f"{layer}: the {part} holds NaN or infinity, so the model is damaged. Fetch it anew.")
        config = self.model.config.get_text_config()
        self.recovery = Recovery(recipe, storage, self.decoder.name, windows, unfused_heads(config), processes)
        warnings = [*opened.warnings, *selection.warnings, *self.recovery.warnings]
        self.ends = selection.ends
        self.report = accounts.begun(recipe, opened, storage, warnings)
        self.report.bytes |= {"outside_saved": self.ends.saved} if self.ends.saved else {}
        self.report.notes = [selection.picked] if selection.picked else []
        self.known_dense: dict[str, Perplexity] = {}  # by fingerprint of the windows
        self.answers = Answers(opened, self.notify, alone=processes.size == 1)
        self.allocated: dict[str, Budget] = {}  # those of the budgets that the data decided
        self.journal: Journal | None = None
        self.with_loader = False  # see ``CheckpointWriter.finish``
        self.writer: CheckpointWriter | None = None  # only the first process has one

    def write_to(self, folder: Path, *, overwrite: bool) -> None:
        """Write shards and records to ``folder`` as the run proceeds; resume what is there.

        Raises:
            InputError: ``folder`` holds another run.
        """
        decides = {
            "recipe": self.recipe.to_dict(),
            "model": self.opened.fingerprint,
            "calibration": text_fingerprint(self.windows),
            "format": FORMAT,
            "solver": revision_of(self.recipe.found_algorithm, REVISION),
        }
        self.runner.folder = folder / HIDDEN
        device = self.weights.device.type
        journal = partial(Journal, folder, decides, self.decoder.name, overwrite=overwrite, device=device)

        def begin() -> None:
            self.journal = journal()
            self.journal.settle()

        self.processes.first_does(begin)
        one_machine = on_this_machine() >= self.processes.size
        self.journal = self.journal or journal(writes=False, late=not one_machine)
        self.journal.share(self.processes)
        self.known_dense |= self.journal.record.dense
        self.report.warnings += self.journal.warnings

    def go(self, evaluation: Mapping[str, Tensor]) -> Report:
        """Run, or resume. ``evaluation`` maps names to token windows (n, seqlen) on which perplexity is measured."""
        if self.journal and self.journal.record.finished:
            return self.once_written(self.remeasure(self.journal, evaluation))
        if evaluation:
            self.answers.ask_dense(self.weights)
        reset_peak_memory()
        if self.journal:
            self.clock.add(self.journal.record.seconds)
        accounts.tell_in_domain(self.report, self.recipe.calibration, evaluation)
        with self.clock("total"):
            dense = self.runner.dense(evaluation, self.known_dense, self.report.warnings, evaluation)
            self.report.dense = perplexities(dense)
            self.distill(*self.walk())
            if self.opened.changes:
                self.round_ends()
                attach(self.model, self.patterns)
            self.finish_files()
            measured = {name: self.measure_result(name, windows) for name, windows in evaluation.items()}
            self.report.compressed = perplexities({name: one.perplexity for name, one in measured.items()})
            self.report.agreement = {name: one.agreement for name, one in measured.items()}
        accounts.complete(
            self.report, self.opened, self.recovery, self.stays_dense, self.ends, self.clock, self.processes
        )
        if evaluation:
            self.report.answers = self.answers.record(self.result)
        if not self.recipe.chooses:
            outside = self.report.bytes["dense"] - self.report.bytes["linears_dense"]
            saved = ends_of(self.model, Recipe(), self.storage, "int8").saved
            self.report.notes += would_take(self.choosable, self.recipe, outside - saved)
        if self.journal and self.processes.first:
            write_reports(self.report, self.journal.folder)
            write_model_card(self.report, self.journal.folder, self.opened.companions)
            found = {text_fingerprint(windows): measured[name] for name, windows in evaluation.items()}
            self.journal.finish(self.known_dense, found)
        elif self.opened.changes:
            untyped: Any = self.model  # a model has no such attribute by itself
            untyped.hf_quantizer.card = card(self.report, base_card(self.report.model))
        return self.once_written(self.report)

    def once_written(self, report: Report) -> Report:
        """Return a report when the first process has written it: exit 0 means that the result is whole."""
        self.processes.part()
        self.processes.barrier()
        return report

    def remeasure(self, journal: Journal, evaluation: Mapping[str, Tensor]) -> Report:
        """Return the report of a finished run on these texts; measure on those not on record."""
        path = journal.folder / "report.json"  # which another machine may see late
        all_loaded = Report.from_dict(self.processes.first_finds(lambda: parse_json(path)), path)
        self.report = replace(all_loaded)
        # to both reports, which share their lists
        accounts.tell_in_domain(self.report, self.recipe.calibration, evaluation)
        known = journal.measured
        texts = {name: text_fingerprint(windows) for name, windows in evaluation.items()}
        new = [name for name, text in texts.items() if text not in known]
        dense = self.runner.dense(evaluation, self.known_dense, self.report.warnings, new)
        if new:
            if self.processes.first:
                journal.require_whole()
            self.processes.part()
        for name in (name for name in new if texts[name] not in known):  # two names may be of one text
            known[texts[name]] = self.measure_result(name, evaluation[name])
        measured = {name: known[text] for name, text in texts.items()}
        self.report = replace(
            all_loaded,
            dense=perplexities(dense),
            compressed=perplexities({name: one.perplexity for name, one in measured.items()}),
            agreement={name: one.agreement for name, one in measured.items()},
        )
        if new and self.processes.first:
            for part, more in ((all_loaded.dense, self.report.dense), (all_loaded.compressed, self.report.compressed)):
                for key, values in more.items():
                    part.setdefault(key, {}).update(values)  # what was measured before stays on record
            all_loaded.agreement |= self.report.agreement
            write_reports(all_loaded, journal.folder)
            write_model_card(all_loaded, journal.folder, self.opened.companions)
            journal.finish(self.known_dense, known)
        return self.report

    @property
    def result(self) -> Weights:
        """The compressed model: as it was written if there is a directory, else as it is in memory."""
        return Written(self.journal.shard, self.decoder, self.weights, self.model) if self.journal else self.weights

    def measure_result(self, name: str, windows: Tensor) -> Measured:
        """Measure the compressed model beside the dense one; RunError if its perplexity is NaN."""
        found = self.runner.measure("compressed perplexity", windows, self.result)
        if math.isnan(found.perplexity.value):
            raise RunError(f"The compressed model's perplexity on {name} is not a number. Use --dtype float32.")
        if found.agreement is None:
            self.report.warnings.append(
                f"The agreement with the dense model on {name} is not known, for its head was changed in memory."
            )
        return found

    @torch.no_grad()
    def walk(self) -> tuple[Recording, ActivationStore | None]:
        """Compress block after block, each on the outputs of the compressed blocks before it.

        Returns:
            The inputs of the first block, and the outputs of the last dense block if training needs them.
        """
        with self.clock("walk"):
            recovery = self.recovery
            recording = self.runner.recorded(
                self.windows, recovery.micro_batch, recovery.held_out, trained=recovery.training is not None
            )
        self.allocate(recording)
        self.begin_files()
        hidden = recording.hidden
        # the inputs of the same block in the dense model
        truth = hidden if self.distills or self.recovery.dense_targets else None
        last_read = self.last_read
        for i, calls in enumerate(recording.calls):
            done = self.block_is_done(i)
            dense = accounts.dense_bytes(self.storage, self.decoder, i)
            with self.weights.block(i, load=not done or truth is not None) as block:
                through = BlockPass(block, calls, hidden, self.decoder.label(i), i, self.processes)
                if truth is not None:
                    with self.clock("matching"):
                        truth = pass_through(replace(through, hidden=truth))
                if done:
                    layers, matching = self.restore_block(i, block)
                else:
                    outputs = hidden.fresh() if self.recovery.by_block and not self.recovery.dense_targets else None
                    layers = []
                    if self.recovery.by_block or self.compresses(i):  # else there is no need to see what it reads
                        layers = compress_block(
                            through, self.recipe, self.budgets, self.storage, self.clock, self.tell_layer, outputs
                        )
                    matching = self.match_block(through, truth if self.recovery.dense_targets else outputs)
                    self.write_block(i, block, layers, matching)
                if i < last_read:
                    with self.clock("walk"):
                        hidden = pass_through(through, check=True)
                accounts.add_block(self.report, self.storage, self.decoder, i, layers, matching, dense)
            self.notify(Progress("blocks", i + 1, len(self.decoder), note=RESTORED if done else ""))
        return recording, truth

    @property
    def last_read(self) -> int:
        """The last block whose inputs are needed."""
        return last_read([self.compresses(i) for i in range(len(self.decoder))], self.recovery.training)

    def compresses(self, i: int) -> bool:
        """Whether any layer of block i is compressed."""
        return any(name.startswith(self.decoder.layer_name(i, "")) for name in self.budgets)

    def block_is_done(self, i: int) -> bool:
        """Whether an earlier run finished block i, as the first process sees it. All processes must call it."""
        found = self.journal is not None and self.processes.first and self.journal.has(i)
        self.processes.part()  # the first one has read a shard
        return bool(self.processes.all_gather(found)[0])

    @property
    def patterns(self) -> dict[str, str]:
        """The pattern that each compressed layer obeys, by its full name."""
        return {name: str(budget.pattern) for name, budget in self.budgets.items()}

    @property
    def distills(self) -> bool:
        """Whether all blocks together are still to be trained."""
        return self.recovery.together and not (self.journal and self.journal.record.distillation)

    def distill(self, recording: Recording, truth: ActivationStore | None) -> None:
        """Train all blocks together, if the recipe asks for it, and write them again."""
        if self.journal:
            self.report.distillation = self.journal.record.distillation
        if truth is None or not self.distills:
            return
        self.meet_at_files()
        with self.clock("matching"), all_loaded(self.result, len(self.decoder)):
            blocks = list(self.decoder.blocks)
            found = self.recovery.distill(self.model, blocks, recording, truth, self.notify, self.training_checkpoint())
            if self.journal and self.writer:
                writer = self.new_writer(self.journal.folder / DISTILLED)
                shards = [writer.write_block(i, block) for i, block in enumerate(blocks)]
                self.journal.note_distilled(shards, found)
            self.processes.part()
        self.report.distillation = found

    def training_checkpoint(self) -> TrainingCheckpoint | None:
        """Where the state of distillation is kept, so that a run that was killed resumes within it."""
        if self.journal is None:
            return None
        found = self.journal.training_for(self.processes)
        return TrainingCheckpoint(found, self.journal.keep_training if self.processes.first else lambda _: None)

    def begin_files(self) -> None:
        """Record what is known before the first block, if there is a directory."""
        if self.journal and self.processes.first:
            self.journal.begin(self.known_dense, self.allocated)
            self.writer = self.new_writer(self.journal.folder)

    def new_writer(self, folder: Path) -> CheckpointWriter:
        """Return a writer of shards, in the data types of the result."""
        return CheckpointWriter(
            folder,
            self.model,
            self.decoder,
            storage=self.storage,
            computed=self.weights.computing,
        )

    def allocate(self, recording: Recording) -> None:
        """Take the budgets from the data, if the recipe asks for it, unless an earlier part of the run has done so."""
        if self.recipe.allocate == "uniform":
            return
        if self.journal and self.journal.record.allocation:
            self.allocated = self.journal.record.allocation
        else:
            advance = counting(self.notify, "allocation", len(self.decoder))
            walk = DenseWalk(self.decoder, self.runner.dense_blocks, recording, advance, self.processes)
            with self.clock("statistics"):
                self.allocated = allocate_by_data(walk, self.recipe, self.budgets, self.storage)
        self.budgets |= self.allocated

    def restore_block(self, i: int, block: nn.Module) -> tuple[list[LayerRecord], list[dict[str, Any]]]:
        """Read a block that an earlier run finished from its shard; return its records."""
        journal = cast("Journal", self.journal)
        read_block(journal.shard(journal.record.blocks[i].file), self.decoder, i, block)
        to_compute(block, self.weights)
        done = journal.record.blocks[i]
        return done.layers, done.matching

    def match_block(self, through: BlockPass, targets: ActivationStore | None) -> list[dict[str, Any]]:
        """Train a compressed block towards ``targets``, if there are any; return its records."""
        if targets is None:
            return []
        with self.clock("matching"):
            return [self.recovery.match_block(through, targets)]

    def tell_layer(self, layer: LayerRecord) -> None:
        """Notify of a layer that was compressed."""
        self.notify(Progress("blocks", layer.block, len(self.decoder), layer))

    def write_block(self, i: int, block: nn.Module, layers: list[LayerRecord], matching: list[dict[str, Any]]) -> None:
        """Write a finished block, if there is a directory."""
        if self.journal and i < self.journal.blocks_done:
            self.report.warnings.append(
                f"The shard of block {i} was damaged after it was written. The block was compressed again."
            )
        if self.journal and self.writer:
            with self.clock("save"):
                shard = self.writer.write_block(i, block)
            self.journal.note_block(shard, layers, matching, self.clock.so_far())
        self.processes.part()  # only the first one writes

    def round_ends(self) -> None:
        """Put the embedding and the output head of the model in memory on the grids that they are stored on."""
        if self.ends.saved:
            from sparlow.model.artefact.embedding import quantise

            quantise(self.model, self.ends.embedding, self.ends.head, storage=self.storage)

    @contextmanager
    def rounded_ends(self) -> Iterator[None]:
        """Within this context, the embedding and the output head are as they are stored, and all else there is."""
        with self.weights.outside_blocks(stored=True):
            if self.opened.changes or not self.ends.saved:
                yield
                return
            from sparlow.model.artefact.embedding import quantised

            with quantised(self.model, self.ends.embedding, self.ends.head, storage=self.storage):
                yield

    def finish_files(self) -> None:
        """Write the weights outside the blocks, and the files that make the directory a model."""
        if self.journal and self.writer:
            with self.clock("save"), self.rounded_ends():
                rest = self.writer.write_rest(self.model)
                self.writer.finish(
                    self.model,
                    self.opened.tokenizer,
                    patterns=self.patterns,
                    companions=self.opened.companions,
                    loader=self.with_loader,
                )
                self.journal.note_rest(rest, self.recipe.to_toml())
        self.meet_at_files()

    def meet_at_files(self) -> None:
        """Wait until the first process has written all shards so far; then each knows their names and sums."""
        self.processes.part()
        if self.journal:
            self.journal.share(self.processes)
        self.processes.barrier()
