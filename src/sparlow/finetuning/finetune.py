"""``sparlow.finetune``: LoRA that starts from U V, on a frozen S.

The adapter of a layer is its own low-rank part (``model.artefact.peft_adapter``), so training starts at the compressed
model and ends in a directory of the same form. A model that was only pruned gets a fresh adapter, which becomes its
low-rank part. Biases, norms, embeddings and S stay as they are, bit for bit.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from sparlow.distributed import require_one
from sparlow.errors import InputError
from sparlow.evaluation.texts import require_context, require_tokenizer, require_vocabulary
from sparlow.exporting.lora import require_base_and_adapter
from sparlow.exporting.stored import Stored
from sparlow.finetuning.examples import Examples
from sparlow.finetuning.options import FinetuneOptions
from sparlow.finetuning.parent import Parent, Paths
from sparlow.machine import pick_device
from sparlow.model.loading.source import OpenedModel, open_model
from sparlow.own_settings import own_settings
from sparlow.progress import Notify
from sparlow.progress.live import watched
from sparlow.recipe.run_options import RunOptions, listed
from sparlow.report.records import Report
from sparlow.run.compress import windows_to_evaluate
from sparlow.run.output_dir import claimed
from sparlow.schema import pick


@own_settings()
def finetune(
    folder: str | Path,
    out: str | Path,
    *,
    dataset: str = FinetuneOptions.dataset,
    steps: int = FinetuneOptions.steps,
    lr: float = FinetuneOptions.lr,
    rank: int | None = FinetuneOptions.rank,
    block_size: int = FinetuneOptions.block_size,
    bos: str = FinetuneOptions.bos,
    column: str = FinetuneOptions.column,
    batch: int = FinetuneOptions.batch,
    accumulate: int = FinetuneOptions.accumulate,
    bf16: bool = FinetuneOptions.bf16,
    gradient_checkpointing: bool = FinetuneOptions.gradient_checkpointing,
    report_to: str = FinetuneOptions.report_to,
    peft: str | Path | None = None,
    evaluate: str | Sequence[str] = RunOptions.evaluate,
    limit: int | None = RunOptions.limit,
    device: str = RunOptions.device,
    seed: int = FinetuneOptions.seed,
    overwrite: bool = False,
    trust_remote_code: bool = RunOptions.trust_remote_code,
    notify: Notify | None = None,
) -> Report:
    """Fine-tune the low-rank part of a compressed model; S keeps every bit.

    Args:
        folder: A finished directory of ``sparlow.compress`` or of this function.
        out: Directory to write; the same call goes on with an unfinished one from its last checkpoint.
        dataset: Corpus or file; read again and again if it has too little. Of records that hold messages, each with a
            role, only the tokens of answers are learnt.
        steps: Of AdamW.
        lr: Its highest learning rate. LoRA's dropout is 0 and its scale 1: see ``peft_adapter`` for other alphas.
        rank: Of the fresh adapters of a model that was only pruned, 16 if left out; no other model takes it.
        block_size: Tokens in a window of the dataset, and the most of a chat, of which the rest is cut off.
        bos: Whether these begin with the beginning-of-text token: auto where the tokenizer adds one, always or never.
        column: That holds the text of files and hub data sets, those to evaluate on among them.
        batch: Windows that pass through the model together.
        accumulate: Such batches a step.
        bf16: Compute in bfloat16 where autocast does.
        gradient_checkpointing: Compute activations twice to save memory.
        report_to: Trainer's integrations, such as tensorboard, separated by commas; all or none.
        peft: Folder for the trained adapter in PEFT's form, with the plain model of all S in ``base`` inside.
        evaluate: Corpora or files on which perplexity is measured before and after, in windows of the recipe's seqlen.
        limit: At most so many windows of each of these; all if left out.
        device: "auto" (an accelerator if there is one), "cpu" or another of torch's.
        seed: Of the choice and the order of text, and of fresh adapters.
        overwrite: Replace a result of sparlow in ``out``.
        trust_remote_code: Let a model bring Python code of its own.
        notify: Called after every step; if left out, the run shows itself on a terminal and in a notebook.

    Returns:
        The report of compression with ``finetuning`` filled in, which is also written to ``out``.

    Raises:
        InputError: Something given cannot be used; what it is.
        RunError: The run could not go on; the same call resumes it.
    """
    plan = pick(FinetuneOptions, locals())
    _require_packages()
    from sparlow.finetuning.job import FineTuning
    from sparlow.finetuning.trainer import check_possible

    device = pick_device(device)
    check_possible(plan, device)
    paths = Paths(Path(folder), Path(out), None if peft is None else Path(peft))
    paths.check()
    with claimed(paths.out, overwrite=overwrite), watched(notify) as tell:
        parent = Parent.read(paths.folder)
        ranks = parent.ranks_to_train(rank)
        if peft is not None:
            require_base_and_adapter(Stored(paths.folder), ranks, "Leave out --peft.")
        opened = open_model(str(folder), device=device, trust_remote_code=trust_remote_code)
        examples = _examples(opened, plan)
        evaluation = windows_to_evaluate(listed(evaluate), opened, parent.report.recipe["seqlen"], limit, column)
        run = FineTuning(parent, opened, paths, plan, ranks, tell)
        run.begin(examples, overwrite=overwrite)
        return run.go(examples, evaluation)


def _examples(opened: OpenedModel, plan: FinetuneOptions) -> Examples:
    """Return what is learnt, which the model can read; raise InputError if there is nothing."""
    require_context(opened.model, plan.block_size, "block-size")
    examples = Examples.read(plan, require_tokenizer(opened.tokenizer, opened.name))
    require_vocabulary(opened.model, examples.all_ids, plan.dataset)
    return examples


def _require_packages() -> None:
    """Raise InputError if a package is missing, before anything is loaded."""
    for package in ("peft", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"Fine-tuning needs the package {package}. Run: pip install 'sparlow[finetune]'")
    require_one("Fine-tuning")
