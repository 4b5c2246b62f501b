"""Train a model that PEFT has wrapped with transformers' Trainer, from its last checkpoint if there is one."""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.state import AcceleratorState, PartialState
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparlow.errors import InputError, RunError, is_out_of_memory
from sparlow.finetuning.examples import Examples, together
from sparlow.finetuning.options import FinetuneOptions
from sparlow.finetuning.safe_trainer import SafeTrainer, last_checkpoint
from sparlow.model._transformers import accelerator_takes_bf16, reporting_integrations
from sparlow.progress import Notify, Progress

if TYPE_CHECKING:
    from peft import PeftModel

STAGE = "fine-tuning"
ACCELERATE = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")  # how names of such variables begin
WARM_UP = 0.03  # of the steps; Adam's first steps are of full size whatever the gradient
_CHECKPOINTS = 10  # at most so many in a run; the last one is kept


def check_possible(plan: FinetuneOptions, device: str) -> None:
    """Check that this machine can do what the options ask for.

    Raises:
        InputError: It cannot.
    """
    if plan.report_to not in ("none", "all"):
        found = reporting_integrations()
        for name in plan.integrations:
            if name not in found:
                there = ", ".join(("none", "all", *found))
                raise InputError(
                    f"The integration {name!r} is unknown or not installed. Give --report-to one of: {there}."
                )
    kind = torch.device(device)
    if kind.index:
        raise InputError(f"Trainer takes the first device, not {device}. Set CUDA_VISIBLE_DEVICES instead.")
    if plan.bf16 and kind.type != "cpu" and not accelerator_takes_bf16():
        raise InputError("This accelerator does not compute in bfloat16. Leave out --bf16.")


def train(
    wrapped: "PeftModel", examples: Examples, plan: FinetuneOptions, checkpoints: Path, notify: Notify = lambda _: None
) -> list[float]:
    """Train the adapters; the model ends where Trainer puts it, in eval mode.

    Args:
        wrapped: Only its adapters are trained.
        examples: What is learnt, read again and again in another order if the steps take more.
        plan: How.
        checkpoints: Folder of Trainer's checkpoints; training resumes from the last one that is whole.
        notify: Called after every step.

    Returns:
        The loss at every step, those before the checkpoint included.

    Raises:
        RunError: The loss or the gradient is not finite, or there is too little memory.
    """
    last = last_checkpoint(checkpoints)
    if last is not None and last[1].global_step == plan.steps:  # Trainer would do a step more
        untyped: Any = wrapped
        untyped.load_adapter(str(last[0]), "default", is_trainable=True)
        wrapped.eval()
        return _losses(last[1])
    with _unchanged(wrapped.config), _own_environment():
        trainer = SafeTrainer(wrapped, _arguments(plan, wrapped, checkpoints), together, train_dataset=examples)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_Watch(notify))
        try:
            trainer.train(resume_from_checkpoint=None if last is None else str(last[0]))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise RunError(
                "Out of memory. Lower --batch and raise --accumulate, or use --gradient-checkpointing."
            ) from error
    wrapped.eval()
    return _losses(trainer.state)


@contextmanager
def _unchanged(config: Any) -> Iterator[None]:  # noqa: ANN401 - PEFT declares no type
    """Restore at the end what Trainer changes for good, such as use_cache, which would be written into the result."""
    before = dict(vars(config))
    try:
        yield
    finally:
        vars(config).clear()
        vars(config).update(before)


@contextmanager
def _own_environment() -> Iterator[None]:
    """Keep what `accelerate launch` sets from deciding how Trainer computes, and what Trainer sets from staying."""
    before = dict(os.environ)
    for name in before:
        if name.startswith(ACCELERATE):
            del os.environ[name]
    shared = [(state._shared_state, dict(state._shared_state)) for state in (AcceleratorState, PartialState)]  # noqa: SLF001 - there is no other way
    AcceleratorState._reset_state(reset_partial_state=True)  # noqa: SLF001 - else an earlier Accelerator decides
    try:
        yield
    finally:
        for name in [name for name in os.environ if name.startswith(ACCELERATE)]:
            del os.environ[name]
        os.environ.update({name: value for name, value in before.items() if name.startswith(ACCELERATE)})
        AcceleratorState._reset_state(reset_partial_state=True)  # noqa: SLF001 - the caller's next one is not Trainer's
        for now, content in shared:  # the caller's own Accelerator reads it
            now.update(content)


def _arguments(plan: FinetuneOptions, wrapped: "PeftModel", folder: Path) -> TrainingArguments:
    on_cpu = wrapped.device.type == "cpu"
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=plan.steps,
        learning_rate=plan.lr,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(WARM_UP * plan.steps),
        per_device_train_batch_size=plan.batch,
        gradient_accumulation_steps=plan.accumulate,
        bf16=plan.bf16,
        gradient_checkpointing=plan.gradient_checkpointing or None,  # what is given is warned of in newer versions
        # the other kind needs inputs that require gradients
        gradient_checkpointing_kwargs={"use_reentrant": False} if plan.gradient_checkpointing else None,
        report_to=plan.report_to if plan.report_to in ("none", "all") else plan.integrations,
        seed=plan.seed,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        save_steps=math.ceil(plan.steps / _CHECKPOINTS),
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # noqa: SLF001 - as Trainer does it itself: no DataParallel, whose batches would be larger
    return arguments


def _losses(state: TrainerState) -> list[float]:
    return [row["loss"] for row in state.log_history if "loss" in row]


class _Watch(TrainerCallback):
    """Notifies of every step, and stops at one that would ruin the model, before its checkpoint is written."""

    def __init__(self, notify: Notify) -> None:
        self._notify = notify

    def on_log(
        self,
        args: TrainingArguments,  # noqa: ARG002 - transformers' signature
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002 - the same
        logs: Mapping[str, float] | None = None,
        **_: Any,  # noqa: ANN401 - the same
    ) -> None:
        if not logs or "loss" not in logs:
            return  # the summary at the end
        if not (math.isfinite(logs["loss"]) and math.isfinite(logs.get("grad_norm", 0.0))):
            raise RunError(f"The loss or its gradient is not finite at step {state.global_step}. Lower --lr.")
        note = f"loss {logs['loss']:.4f}"
        self._notify(Progress(STAGE, state.global_step, state.max_steps, note=note))
