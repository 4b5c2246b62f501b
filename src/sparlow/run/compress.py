"""``sparlow.compress``: open the model, cut the text, run the job."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparlow.distributed import Processes, joined
from sparlow.errors import InputError
from sparlow.evaluation.perplexity import require_context, require_tokenizer
from sparlow.machine import pick_device
from sparlow.model.artefact.dtypes import StoredDtypes
from sparlow.model.forward.generate import own_windows
from sparlow.model.loading.objects import in_eval_mode, require_as_it_is, require_usable
from sparlow.model.loading.source import OpenedModel, open_model, upcast_for_cpu
from sparlow.model.loading.weights import all_loaded, scan
from sparlow.planning.feasibility import require_feasible
from sparlow.progress import Notify
from sparlow.recipe.recipe import GIVEN_WINDOWS, OWN_TEXT, Recipe, with_calibration
from sparlow.recipe.run_options import RunOptions, listed
from sparlow.report.records import Report
from sparlow.run.job import Job
from sparlow.run.output_dir import claimed
from sparlow.text import calibration_windows, evaluation_windows


def compress(
    model: str | Path | PreTrainedModel,
    recipe: Recipe | None = None,
    *,
    calibration: str | Path | Tensor | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    out: str | Path | None = None,
    evaluate: Sequence[str] = ("builtin",),
    evaluate_seqlen: int | None = None,
    limit: int | None = None,
    device: str = "auto",
    offload: str = "auto",
    inplace: bool = False,
    overwrite: bool = False,
    force: bool = False,
    trust_remote_code: bool = False,
    notify: Notify = lambda _: None,
) -> Report:
    """Compress every linear layer of every decoder block of a causal language model.

    The result goes to ``out``, into the model object that is given (``inplace=True``), or both.

    Args:
        model: Hub id, directory, .gguf file, or a transformers model, which stays as it is unless ``inplace``.
        recipe: What to do; the defaults of ``Recipe`` if left out.
        calibration: Corpus, file, or token windows (n, seqlen) int64; instead of the recipe's.
        tokenizer: Needed with a transformers model if text is used.
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
        notify: Called after every step.

    Returns:
        The report, which is also written to ``out`` as ``report.json`` and ``report.html``.

    Raises:
        InputError: Something given cannot be used, or memory or disk do not suffice.
        RunError: The run could not go on; with ``out``, the same call resumes it.
    """
    _require_place(model, out, inplace=inplace)
    recipe = with_calibration(recipe or Recipe(), calibration)
    if isinstance(model, PreTrainedModel):
        require_as_it_is(model, recipe.dtype, device)
    options = RunOptions(device, offload, listed(evaluate), evaluate_seqlen, limit, trust_remote_code)
    folder = None if out is None else Path(out)
    kept = in_eval_mode(model) if isinstance(model, PreTrainedModel) else nullcontext()
    with kept, joined() as processes, claimed_by_first(processes, folder, overwrite=overwrite):
        if not force:
            require_feasible(model, {folder: recipe}, options, processes.size)
        opened, storage = open_dense(model, tokenizer, recipe, options, inplace=inplace)
        windows = windows_to_calibrate(calibration, opened, recipe)
        # cut before the run, so that a missing file is noticed at once
        evaluation = windows_to_evaluate(options.evaluate, opened, evaluate_seqlen or recipe.seqlen, limit)
        job = Job(opened, storage, recipe, windows, notify, offload=offload, processes=processes)
        if folder is not None:
            job.write_to(folder, overwrite=overwrite)
        return job.go(evaluation)


def _require_place(model: object, out: str | Path | None, *, inplace: bool) -> None:
    """Raise InputError if the model cannot be taken, or its result would be lost."""
    require_usable(model)
    named = isinstance(model, str | Path)
    if named and inplace:
        raise InputError("inplace=True is for a model object. Give out= with the directory for the result.")
    if out is None and not inplace:
        instead = "" if named else ", or inplace=True to put the compressed layers into this model"
        raise InputError(f"The result would be lost. Give out= with a directory for it{instead}.")


def claimed_by_first(processes: Processes, folder: Path | None, *, overwrite: bool) -> AbstractContextManager[None]:
    """See ``output_dir.claimed``; the first process claims the directory, if there is one, for all of them."""
    if folder is None or not processes.first:
        return nullcontext()
    return claimed(folder, overwrite=overwrite)


def open_dense(
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    recipe: Recipe,
    options: RunOptions,
    *,
    inplace: bool = False,
    streamed: bool = True,
) -> tuple[OpenedModel, StoredDtypes]:
    """Return the model ready to compute, and the types it came in. An object is taken as it is.

    Args:
        model: Hub id, directory, .gguf file, or a transformers model.
        tokenizer: Goes before the one that comes with the model.
        recipe: Says the type of the weights.
        options: The device, and whether the model may bring code.
        inplace: A model object is changed; otherwise it stays as it is.
        streamed: The weights of a model that is named stay on disk.
    """
    if isinstance(model, PreTrainedModel):
        name = model.config.name_or_path or type(model).__name__
        seen = scan([model.state_dict(keep_vars=True)])
        found = OpenedModel(model, tokenizer, name, seen.fingerprint, seen.damaged, untouched=not inplace)
        return found, StoredDtypes.of(model)
    opened = open_model(
        str(model),
        dtype=recipe.dtype,
        device=pick_device(options.device),
        trust_remote_code=options.trust_remote_code,
        streamed=streamed,
    )
    storage = StoredDtypes.of(opened.model)
    ready = opened.model if opened.on_disk else upcast_for_cpu(opened.model)
    return replace(opened, model=ready, tokenizer=tokenizer or opened.tokenizer), storage


def windows_to_calibrate(calibration: str | Path | Tensor | None, opened: OpenedModel, recipe: Recipe) -> Tensor:
    """Return the calibration windows (samples, seqlen) int64."""
    require_context(opened.model, recipe.seqlen)
    if isinstance(calibration, Tensor):
        vocabulary = opened.model.config.get_text_config().vocab_size
        if calibration.min() < 0 or calibration.max() >= vocabulary:
            raise InputError(
                f"Calibration windows hold token ids outside of the vocabulary of {vocabulary}. "
                "Use the model's own tokenizer."
            )
        return calibration.cpu()
    if recipe.calibration == GIVEN_WINDOWS:
        raise InputError("The recipe was made for token windows given directly. Give them, or name a corpus or a file.")
    samples, seqlen, seed = recipe.samples, recipe.seqlen, recipe.seed
    if recipe.calibration == OWN_TEXT:
        parts, count = opened.on_disk, len(opened.decoder)
        with all_loaded(parts, count) if parts else nullcontext():
            return own_windows(opened.model, samples=samples, seqlen=seqlen, seed=seed, fingerprint=opened.fingerprint)
    tokenizer = require_tokenizer(opened.tokenizer, opened.name)
    return calibration_windows(recipe.calibration, tokenizer, samples=samples, seqlen=seqlen, seed=seed)


def windows_to_evaluate(
    corpora: Sequence[str], opened: OpenedModel, seqlen: int, limit: int | None
) -> dict[str, Tensor]:
    """Return the windows (n, seqlen) int64 of each corpus or file on which perplexity is measured."""
    require_context(opened.model, seqlen)
    found = {}
    for corpus in corpora:
        tokenizer = require_tokenizer(opened.tokenizer, opened.name)
        found[corpus] = evaluation_windows(corpus, tokenizer, seqlen=max(seqlen, 2), limit=limit)
    return found
