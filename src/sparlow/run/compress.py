"""``sparlow.compress``: open the model, cut the text into windows, run the job."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparlow.distributed import Processes, joined, require_own_device
from sparlow.errors import InputError, RunError, is_out_of_memory, out_of_memory
from sparlow.evaluation.texts import require_context, require_tokenizer, require_vocabulary, texts_to_measure
from sparlow.machine import pick_device, versions
from sparlow.model.artefact.dtypes import StoredDtypes
from sparlow.model.forward.causality import require_causal
from sparlow.model.forward.generate import own_windows
from sparlow.model.loading.objects import in_eval_mode, require_as_it_is, require_usable
from sparlow.model.loading.source import OpenedModel, as_tokenizer, open_model, upcast_for_cpu
from sparlow.model.loading.streaming import CannotStreamError
from sparlow.model.loading.weights import Scan, all_loaded, scan
from sparlow.own_settings import own_settings
from sparlow.planning.feasibility import options_that_help, require_feasible
from sparlow.progress import Notify
from sparlow.progress.live import watched
from sparlow.recipe.recipe import (
    GIVEN_TEXTS,
    GIVEN_WINDOWS,
    OWN_TEXT,
    Recipe,
    RecipeLike,
    as_recipe,
    with_calibration,
)
from sparlow.recipe.run_options import RunOptions, listed
from sparlow.report.records import Report
from sparlow.run.job import Job
from sparlow.run.output_dir import claimed
from sparlow.text import beginning, calibration_windows
from sparlow.text import fingerprint as text_fingerprint

if TYPE_CHECKING:
    from sparlow.recipe.recipe import Calibration


@own_settings()
def compress(
    model: str | Path | PreTrainedModel,
    recipe: RecipeLike | None = None,
    *,
    calibration: "Calibration | None" = None,
    tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
    out: str | Path | None = None,
    evaluate: str | Sequence[str] = ("builtin",),
    evaluate_seqlen: int | None = None,
    limit: int | None = None,
    device: str = "auto",
    offload: str = "auto",
    inplace: bool = False,
    overwrite: bool = False,
    force: bool = False,
    trust_remote_code: bool = False,
    with_loader: bool = False,
    notify: Notify | None = None,
    **fields: Any,  # noqa: ANN401 - fields of a recipe have many types
) -> Report:
    """Compress every linear layer of every decoder block of a causal language model.

    The result goes to ``out``, into the model object that is given (``inplace=True``), or both.

    Args:
        model: Hub id, directory, .gguf file, or a transformers model, which stays as it is unless ``inplace``.
        recipe: What to do, as a ``Recipe``, a dict of its fields, the path of its file or the name of a packaged one;
            its defaults if left out.
        calibration: Corpus, file, list of texts, or token windows (n, seqlen) int64; instead of the recipe's.
        tokenizer: Needed with a transformers model if text is used; itself, or the directory or hub id it comes from.
        out: Directory to write as the run proceeds; an unfinished one is resumed. A model that is named is then read
            block by block and never in memory as a whole.
        evaluate: Corpora or files on which perplexity is measured, dense first and compressed at the end.
        evaluate_seqlen: Tokens in a window of these; the recipe's seqlen if left out.
        limit: At most so many windows of each of these; all if left out.
        device: "auto" (an accelerator if there is one), or torch's name of a device. A model object stays where it is.
        offload: Where to keep block inputs between blocks: "cpu", "disk", or "auto" for the fastest that fits.
        inplace: Put the compressed layers into the model object that is given. Needs no ``out``.
        overwrite: Replace a result of sparlow in ``out``.
        force: Start even if the memory or disk that ``sparlow.plan`` estimates exceeds what is available.
        trust_remote_code: Let a model bring Python code of its own.
        with_loader: Also write ``modeling_sparlow.py``, by which transformers imports sparlow, or names it as missing,
            under ``trust_remote_code=True``.
        notify: Called after every step; if left out, the run shows itself on a terminal and in a notebook.
        fields: Of the recipe, such as ``pattern="2:4"``, in the place of what it says.

    Returns:
        The report, which is also written to ``out`` as ``report.json`` and ``report.html``.

    Raises:
        InputError: Something given cannot be used, or memory or disk do not suffice.
        RunError: The run could not go on; with ``out``, the same call resumes it.
    """
    _require_place(model, out, inplace=inplace)
    recipe = with_calibration(as_recipe(recipe, fields), calibration)
    if isinstance(model, PreTrainedModel):
        require_as_it_is(model, recipe.dtype, device)
    options = RunOptions(device, offload, listed(evaluate), evaluate_seqlen, limit, trust_remote_code)
    tokenizer = as_tokenizer(tokenizer)
    folder = None if out is None else Path(out)
    kept = in_eval_mode(model) if isinstance(model, PreTrainedModel) else nullcontext()
    alone = partial(claimed_by_first, folder=folder, overwrite=overwrite)
    with kept, joined(_told(recipe, options, folder)) as processes, alone(processes), watched(notify) as tell:
        if not force:
            require_feasible(model, {folder: recipe}, options, processes.size)
        with memory_may_end(model, recipe, options, processes, folder):
            scanning = partial(scanned_by_first, processes)
            opened, storage = open_dense(model, tokenizer, recipe, options, inplace=inplace, scanning=scanning)
            require_own_device(processes, opened.weights.device)
            windows = _windows_for_all(processes, calibration, opened, recipe)
            # cut before the run, so that a missing file is noticed at once
            seqlen = evaluate_seqlen or recipe.seqlen
            evaluation = windows_to_evaluate(options.evaluate, opened, seqlen, limit, recipe.column)
            processes.require_alike(_seen(opened, evaluation))
            job = Job(opened, storage, recipe, windows, tell, offload=offload, processes=processes)
            if folder is not None:
                job.with_loader = with_loader
                job.write_to(folder, overwrite=overwrite)
            return job.go(evaluation)


def _told(recipe: Recipe, options: RunOptions, folder: Path | None) -> dict[str, Any]:
    """What each of several processes must have been told alike, and computes with; offload need not be."""
    measured = {"evaluate": options.evaluate, "evaluate_seqlen": options.evaluate_seqlen, "limit": options.limit}
    return {**recipe.to_dict(), **measured, "writes": folder is not None, **versions()}


def _seen(opened: OpenedModel, evaluation: Mapping[str, Tensor]) -> dict[str, str]:
    """What each of several processes has read of model and texts, which they do not tell each other."""
    config = opened.model.config.to_dict()
    config.pop("_name_or_path", None)  # a machine may have it in another place
    whole = json.dumps(config, sort_keys=True, default=str)
    device = opened.weights.device.type  # others could not exchange with one that has found no accelerator
    read = {f"the text {name}": text_fingerprint(windows) for name, windows in evaluation.items()}
    return {"--device": device, "the model's config": hashlib.sha256(whole.encode()).hexdigest(), **read}


def _require_place(model: object, out: str | Path | None, *, inplace: bool) -> None:
    """Raise InputError if the model cannot be taken, or its result would be lost."""
    require_usable(model)
    named = isinstance(model, str | Path)
    if named and inplace:
        raise InputError("inplace=True is for a model object. Give out= with the directory for the result.")
    if out is None and not inplace:
        instead = "" if named else ", or inplace=True to put the compressed layers into this model"
        raise InputError(f"The result would be lost. Give out= with a directory for it{instead}.")


@contextmanager
def memory_may_end(
    model: str | Path | PreTrainedModel, recipe: Recipe, options: RunOptions, processes: Processes, folder: Path | None
) -> Iterator[None]:
    """Turn whatever says that memory ran out, on the CPU, in CUDA or its libraries, into a RunError with what helps."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        helpful: list[str] = []
        with suppress(Exception):  # there may be too little memory even for this
            helpful = options_that_help(model, recipe, options, processes.size, folder)
        raise RunError(out_of_memory(error, helpful)) from error


@contextmanager
def claimed_by_first(processes: Processes, folder: Path | None, *, overwrite: bool) -> Iterator[None]:
    """Claim the output directory, if there is one, in the first process; see ``output_dir.claimed``."""
    with ExitStack() as stack:
        if folder is not None:
            processes.first_does(lambda: stack.enter_context(claimed(folder, overwrite=overwrite)))
        yield


def open_dense(
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    recipe: Recipe,
    options: RunOptions,
    *,
    inplace: bool = False,
    streamed: bool = True,
    scanning: Callable[[Callable[[], Scan]], Scan] = lambda scan: scan(),
) -> tuple[OpenedModel, StoredDtypes]:
    """Return the model ready to compute, and its stored types. A model object is taken as it is.

    Args:
        model: Hub id, directory, .gguf file, or a transformers model.
        tokenizer: Takes precedence over the one that comes with the model.
        recipe: Says the type of the weights.
        options: The device, and whether the model may bring code.
        inplace: A model object is changed; otherwise it stays as it is.
        streamed: Leave the weights on disk, unless the model is an object.
        scanning: See ``open_model``.

    Raises:
        InputError: It cannot be opened, or is no causal language model.
    """
    if isinstance(model, PreTrainedModel):
        name = model.config.name_or_path or type(model).__name__
        require_causal(model.eval(), name)
        seen = scan([model.state_dict(keep_vars=True)])
        found = OpenedModel(model, tokenizer, name, seen.fingerprint, seen.damaged, untouched=not inplace)
        return found, StoredDtypes.of(model)
    opened = open_model(
        str(model),
        dtype=recipe.dtype,
        device=pick_device(options.device),
        trust_remote_code=options.trust_remote_code,
        streamed=streamed,
        scanning=scanning,
    )
    storage = StoredDtypes.of(opened.model)
    ready = opened.model if opened.on_disk else upcast_for_cpu(opened.model)
    if opened.on_disk:
        with opened.on_disk.outside_blocks(), opened.on_disk.block(0):
            require_causal(ready, opened.name, first_block=True)
    else:
        require_causal(ready, opened.name)
    return replace(opened, model=ready, tokenizer=tokenizer or opened.tokenizer), storage


def scanned_by_first(processes: Processes, scanning: Callable[[], Scan]) -> Scan:
    """Let the first process read every weight of the model, once for all: others may be many, on one file system."""

    def find() -> dict[str, Any]:
        try:
            seen = scanning()
        except CannotStreamError as problem:
            return {"problem": str(problem)}
        return {"fingerprint": seen.fingerprint, "damaged": sorted(seen.damaged)}

    told = processes.first_finds(find)
    if "problem" in told:
        raise CannotStreamError(told["problem"])
    return Scan(told["fingerprint"], frozenset(told["damaged"]))


def _windows_for_all(
    processes: Processes, calibration: "Calibration | None", opened: OpenedModel, recipe: Recipe
) -> Tensor:
    """Return the calibration windows. The model's own text one process writes for all: it takes long, but for a cache.

    Only that process then needs room for the whole model.
    """
    if recipe.calibration != OWN_TEXT:
        return windows_to_calibrate(calibration, opened, recipe)
    told = processes.first_finds(lambda: windows_to_calibrate(calibration, opened, recipe).tolist())
    return torch.tensor(told, dtype=torch.int64)


def windows_to_calibrate(calibration: "Calibration | None", opened: OpenedModel, recipe: Recipe) -> Tensor:
    """Return the calibration windows (samples, seqlen) int64."""
    require_context(opened.model, recipe.seqlen)
    if isinstance(calibration, Tensor):
        require_vocabulary(opened.model, calibration, "Calibration windows")
        return calibration.cpu()
    if recipe.calibration == GIVEN_WINDOWS:
        raise InputError("The recipe was made for token windows given directly. Give them, or name a corpus or a file.")
    if recipe.calibration == OWN_TEXT:
        return _own_text(opened, recipe)
    if recipe.calibration == GIVEN_TEXTS and not isinstance(calibration, list | tuple):
        raise InputError("The recipe was made for a list of texts. Give it, or name a corpus or a file.")
    tokenizer = require_tokenizer(opened.tokenizer, opened.name)
    windows = calibration_windows(
        calibration if isinstance(calibration, list | tuple) else recipe.calibration,
        tokenizer,
        samples=recipe.samples,
        seqlen=recipe.seqlen,
        seed=recipe.seed,
        begin=beginning(tokenizer, recipe.bos),
        column=recipe.column,
    )
    return require_vocabulary(opened.model, windows, recipe.calibration)


def _own_text(opened: OpenedModel, recipe: Recipe) -> Tensor:
    """Let the model write its calibration windows, which begin as those of other text do."""
    parts, count, own = opened.on_disk, len(opened.decoder), opened.tokenizer
    begin = beginning(own, "auto") if own else ()
    with all_loaded(parts, count) if parts else nullcontext():
        return own_windows(
            opened.model,
            samples=recipe.samples,
            seqlen=recipe.seqlen,
            seed=recipe.seed,
            fingerprint=opened.fingerprint,
            begin=begin,
            kept=recipe.bos == "always" or (recipe.bos == "auto" and bool(begin or own is None)),
        )


def windows_to_evaluate(
    corpora: Sequence[str], opened: OpenedModel, seqlen: int, limit: int | None, column: str
) -> dict[str, Tensor]:
    """Return the windows (n, seqlen) int64 of each corpus or file on which perplexity is measured."""
    require_context(opened.model, seqlen)
    if not corpora:
        return {}
    tokenizer = require_tokenizer(opened.tokenizer, opened.name)
    return texts_to_measure(corpora, opened.model, tokenizer, seqlen=max(seqlen, 2), limit=limit, column=column)
