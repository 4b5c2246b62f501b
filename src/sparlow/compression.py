"""The whole job: open, check, measure, walk, write, measure again, report."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparlow.errors import InputError
from sparlow.evaluation import perplexity, require_context, require_tokenizer
from sparlow.journal import Journal, check_folder
from sparlow.model.blocks import Call, decoder_blocks, linears, not_compressed, run_block
from sparlow.model.checkpoint import CheckpointWriter, read_block
from sparlow.model.layers import SparseLowRankLinear, compressed_layers
from sparlow.model.quantizer import attach
from sparlow.model.recording import record
from sparlow.model.source import OpenedModel, fingerprint, for_computing, open_model
from sparlow.page import write_reports
from sparlow.pipeline import check_layers, compress_block, name_what_is_not_finite
from sparlow.progress import Clock, Notify, Progress
from sparlow.recipe import GIVEN_WINDOWS, Recipe
from sparlow.report import LayerRecord, Report, peak_memory
from sparlow.text import calibration_windows, evaluation_windows
from sparlow.text import fingerprint as text_fingerprint

MICRO_BATCH_TOKENS = 4096  # tokens that pass through a block at a time


def compress(
    model: str | Path | PreTrainedModel,
    recipe: Recipe | None = None,
    *,
    calibration: str | Path | Tensor | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    out: str | Path | None = None,
    evaluate: Sequence[str] = ("builtin",),
    limit: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    notify: Notify = lambda _: None,
) -> Report:
    """Compress every linear layer of every decoder block of a causal language model.

    Args:
        model: Hub id, directory, .gguf file, or a transformers model, which is then compressed in place.
        recipe: What to do; the defaults of ``Recipe`` if left out.
        calibration: Corpus, file, or token windows (n, seqlen) int64; instead of the recipe's.
        tokenizer: Needed with a transformers model if text is used.
        out: Directory to write as the run proceeds; an unfinished one is resumed. Without it nothing is written.
        evaluate: Corpora or files on which perplexity is measured, dense first and compressed at the end.
        limit: At most so many windows of each of these; all if left out.
        device: "auto" (an accelerator if there is one), or torch's name of a device. A model object stays where it is.
        overwrite: Replace a result of sparlow in ``out``.
        trust_remote_code: Let a model bring Python code of its own.
        notify: Called after every step.

    Returns:
        The report, which is also written to ``out`` as ``report.json`` and ``report.html``.

    Raises:
        InputError: Something given cannot be used; what it is.
        RunError: The run could not go on; with ``out``, the same call resumes it.
    """
    recipe = _with_calibration(recipe or Recipe(), calibration)
    if out is not None:
        check_folder(Path(out), overwrite=overwrite)
    opened, storage = _open(model, tokenizer, recipe, device, trust_remote_code=trust_remote_code)
    require_context(opened.model, recipe.seqlen)
    windows = _windows(calibration, opened, recipe)
    # cut before the run, so that a missing file is noticed at once
    evaluation = {name: _evaluation_windows(name, opened, recipe.seqlen, limit) for name in evaluate}
    run = _Run(opened, storage, recipe, windows, notify)
    if out is not None:
        run.write_to(Path(out), overwrite=overwrite)
    return run.go(evaluation)


def _open(
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    recipe: Recipe,
    device: str,
    *,
    trust_remote_code: bool,
) -> tuple[OpenedModel, "Storage"]:
    """Return the model ready to compute, and the types it came in. An object is taken as it is."""
    if isinstance(model, PreTrainedModel):
        name = model.config.name_or_path or type(model).__name__
        return OpenedModel(model.eval(), tokenizer, name, fingerprint(model)), Storage.of(model)
    opened = open_model(str(model), dtype=recipe.dtype, device=pick_device(device), trust_remote_code=trust_remote_code)
    storage = Storage.of(opened.model)
    return replace(opened, model=for_computing(opened.model), tokenizer=tokenizer or opened.tokenizer), storage


def pick_device(name: str) -> str:
    """Resolve "auto": an accelerator if there is one, else the CPU."""
    if name != "auto":
        return name
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if accelerator is None else accelerator.type


def _with_calibration(recipe: Recipe, calibration: str | Path | Tensor | None) -> Recipe:
    if calibration is None:
        return recipe
    if not isinstance(calibration, Tensor):
        return recipe.changed(calibration=str(calibration))
    if calibration.ndim != 2 or calibration.dtype != torch.int64 or calibration.numel() == 0:  # noqa: PLR2004 - a matrix
        raise InputError("Calibration windows must be a tensor (windows, seqlen) of int64 token ids.")
    return recipe.changed(calibration=GIVEN_WINDOWS, samples=calibration.shape[0], seqlen=calibration.shape[1])


def _windows(calibration: str | Path | Tensor | None, opened: OpenedModel, recipe: Recipe) -> Tensor:
    """Return the calibration windows (samples, seqlen) int64."""
    if isinstance(calibration, Tensor):
        vocabulary = opened.model.config.get_text_config().vocab_size
        if calibration.min() < 0 or calibration.max() >= vocabulary:
            raise InputError(f"Calibration windows hold token ids outside of the vocabulary of {vocabulary}.")
        return calibration.cpu()
    if recipe.calibration == GIVEN_WINDOWS:
        raise InputError("The recipe was made for token windows given directly: give them, or name a corpus or a file.")
    tokenizer = require_tokenizer(opened.tokenizer, opened.name)
    sizes = {"samples": recipe.samples, "seqlen": recipe.seqlen, "seed": recipe.seed}
    return calibration_windows(recipe.calibration, tokenizer, **sizes)


def _evaluation_windows(corpus: str, opened: OpenedModel, seqlen: int, limit: int | None) -> Tensor:
    tokenizer = require_tokenizer(opened.tokenizer, opened.name)
    return evaluation_windows(corpus, tokenizer, seqlen=max(seqlen, 2), limit=limit)


@dataclass(frozen=True)
class Storage:
    """The types of the result's weights, which are those of the model as it came; it may compute in another.

    Attributes:
        dtype: Of nearly all.
        exceptions: Names of the tensors that have a type of their own, such as a router's bias in float32.
    """

    dtype: torch.dtype
    exceptions: frozenset[str]

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Storage":
        """Look at a model before it changes its type for computing."""
        state = model.state_dict().items()
        return cls(model.dtype, frozenset(name for name, tensor in state if tensor.dtype != model.dtype))


class _Run:
    """One compression from the checks to the report; writes only after ``write_to``."""

    def __init__(self, opened: OpenedModel, storage: Storage, recipe: Recipe, windows: Tensor, notify: Notify) -> None:
        self.opened, self.recipe, self.windows, self.notify = opened, recipe, windows, notify
        self.storage = storage
        self.model = opened.model
        self.blocks_name, self.blocks = decoder_blocks(self.model)
        check_layers(self.blocks_name, self.blocks, recipe)
        self.clock = Clock()
        self.report = Report(recipe=recipe.to_dict(), model=opened.name)
        self.report.bytes = {"dense": self.bytes_of(self.model), "linears_dense": 0, "linears_compressed": 0}
        self.known_dense: dict[str, float] = {}  # perplexity by fingerprint of the windows
        self.journal: Journal | None = None
        self.writer: CheckpointWriter | None = None

    def write_to(self, folder: Path, *, overwrite: bool) -> None:
        """Write shards and records to ``folder`` as the run proceeds, going on from what is there."""
        decides = {
            "recipe": self.recipe.to_dict(),
            "model": self.opened.fingerprint,
            "calibration": text_fingerprint(self.windows),
            "version": version("sparlow"),
        }
        self.journal = Journal(folder, decides, self.blocks_name, overwrite=overwrite)
        self.known_dense = self.journal.dense

    def go(self, evaluation: dict[str, Tensor]) -> Report:
        with self.clock("total"):
            self.measure_dense(evaluation)
            self.walk()
            attach(self.model)
            self.finish_files()
            for name, windows in evaluation.items():
                value = self.perplexity("compressed perplexity", windows)
                self.report.compressed["perplexity"][name] = value
        self.complete_report()
        if self.journal:
            write_reports(self.report, self.journal.folder)
            self.journal.finish()
        return self.report

    def measure_dense(self, evaluation: dict[str, Tensor]) -> None:
        """The sanity gate: a number for the model as it came, before any number for what becomes of it."""
        for name, windows in evaluation.items():
            text = text_fingerprint(windows)
            value = self.known_dense.get(text) or self.perplexity("dense perplexity", windows)
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

    def perplexity(self, stage: str, windows: Tensor) -> float:
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            self.notify(Progress(stage, done, len(windows)))

        with self.clock("evaluate"):
            return perplexity(self.model, windows, advance)

    @torch.no_grad()
    def walk(self) -> None:
        """Compress block after block, each fed by the compressed ones before it."""
        with self.clock("walk"):
            micro_batch = max(MICRO_BATCH_TOKENS // self.windows.shape[1], 1)
            recording = record(self.model, self.windows, micro_batch=micro_batch)
        hidden = recording.hidden
        if self.journal:
            self.journal.begin(self.known_dense)
            self.writer = CheckpointWriter(
                self.journal.folder,
                self.model,
                self.blocks_name,
                len(self.blocks),
                dtype=self.storage.dtype,
                kept=self.storage.exceptions,
            )
        for i, block in enumerate(self.blocks):
            self.report.bytes["linears_dense"] += sum(map(self.bytes_of, linears(block).values()))
            self.report.layers += self.restored(i, block) or self.compressed(i, block, recording.calls[i], hidden)
            self.report.bytes["linears_compressed"] += sum(map(self.packed_bytes, compressed_layers(block).values()))
            if i + 1 == len(self.blocks):  # nobody reads what leaves the last block
                hidden = []
            with self.clock("walk"):
                hidden = [run_block(block, x, recording.calls[i][len(x)]).to(x.device) for x in hidden]
            self.notify(Progress("blocks", i + 1, len(self.blocks)))

    def restored(self, i: int, block: nn.Module) -> list[LayerRecord]:
        """Take a block that an earlier run finished from its shard; return its records, none if there is no such."""
        if self.journal is None or i >= self.journal.blocks_done:
            return []
        self.journal.check_shard(i)
        read_block(self.journal.folder, self.blocks_name, i, block)
        block.to(self.model.dtype)
        return self.journal.layers(i)

    def compressed(
        self, i: int, block: nn.Module, calls: Mapping[int, Call], hidden: list[Tensor]
    ) -> list[LayerRecord]:
        """Compress a block and, if there is a directory, write it."""

        def on_layer(layer: LayerRecord) -> None:
            self.notify(Progress("blocks", i, len(self.blocks), layer))

        layers = compress_block(
            block, (self.blocks_name, i), calls, hidden, self.recipe, self.storage.dtype, self.clock, on_layer
        )
        if self.journal and self.writer:
            with self.clock("save"):
                self.journal.note_block(self.writer.write_block(i, block), layers)
        return layers

    def finish_files(self) -> None:
        """Write what lies outside of the blocks and the files that make the directory a model."""
        if self.journal and self.writer:
            with self.clock("save"):
                rest = self.writer.write_rest(self.model)
                self.writer.finish(self.model, self.opened.tokenizer)
                self.journal.note_rest(rest, self.recipe.to_toml())

    def complete_report(self) -> None:
        report, sizes = self.report, self.report.bytes
        sizes["compressed"] = sizes["dense"] - sizes["linears_dense"] + sizes["linears_compressed"]
        weights = sum(layer.shape[0] * layer.shape[1] for layer in report.layers)
        report.bits_per_weight = 8 * sizes["linears_compressed"] / weights
        report.seconds, report.peak_memory = self.clock.seconds, peak_memory()
        names = {layer: f"{self.blocks_name}.{layer.block}.{layer.name}" for layer in report.layers}
        report.warnings += [f"{names[layer]}: {warning}" for layer in report.layers for warning in layer.warnings]
        report.not_compressed = [asdict(row) for row in not_compressed(self.model, names.values())]

    def bytes_of(self, module: nn.Module) -> int:
        """Bytes of a module's parameters as stored, tied ones once."""
        return sum(p.numel() for p in module.parameters()) * self.storage.dtype.itemsize

    def packed_bytes(self, layer: SparseLowRankLinear) -> int:
        """Bytes as stored: kept values, one bit a weight (whole bytes a row), U, V and the bias."""
        rows, columns = layer.S.shape
        pruned = layer.S.numel() - int((layer.S != 0).sum())
        return self.bytes_of(layer) - pruned * self.storage.dtype.itemsize + rows * ((columns + 7) // 8)
