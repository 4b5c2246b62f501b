"""How a result is fine-tuned: the options of ``sparlow.finetune`` that say how its text is read and trained on."""

from dataclasses import dataclass
from typing import Annotated, Any

from sparlow.recipe.recipe import BOS
from sparlow.schema import ABOVE_0, Choices, Doc, Panel, Unset, at_least, check_fields, documented, values_of

FRESH_RANK = 16
TEXT, TRAINING, MACHINE = Panel("Text"), Panel("Training"), Panel("Machine")
NOT_DECIDING = ("rank", "gradient_checkpointing", "report_to")  # the first counts as the ranks that follow from it


@documented
@dataclass(frozen=True)
class FinetuneOptions:
    """How to train."""

    dataset: Annotated[
        str,
        Doc(
            "Text to train on: c4, wikitext2, ptb, builtin, a file or a hub data set. Short text is read repeatedly. "
            "Where records hold messages, only answers are learnt."
        ),
        TEXT,
    ] = "c4"
    steps: Annotated[int, Doc("Number of optimiser steps (AdamW)."), at_least(1), TRAINING] = 500
    lr: Annotated[
        float, Doc("Peak learning rate, after a short warm-up; a cosine leads from there to zero."), ABOVE_0, TRAINING
    ] = 1e-4
    rank: Annotated[
        int | None,
        Doc("Rank of the fresh adapters of a model that was only pruned. No other model takes this option."),
        Unset(str(FRESH_RANK)),
        TRAINING,
    ] = None
    block_size: Annotated[int, Doc("Tokens in each window of the text, at most in each chat."), at_least(2), TEXT] = (
        1024
    )
    batch: Annotated[int, Doc("Windows in each batch."), at_least(1), TRAINING] = 4
    accumulate: Annotated[int, Doc("Batches in each optimiser step."), at_least(1), TRAINING] = 4
    bf16: Annotated[bool, Doc("Compute in bfloat16 where autocast does; S, U and V keep their types."), MACHINE] = False
    gradient_checkpointing: Annotated[
        bool, Doc("Compute activations again in the backward pass: less memory, more time."), MACHINE
    ] = False
    bos: Annotated[
        str,
        Doc(
            "Whether windows of the text begin with the beginning-of-text token, within their block size. auto does so "
            "where the tokenizer adds one by itself."
        ),
        Choices("way to begin a window", BOS),
        TEXT,
    ] = "auto"
    column: Annotated[
        str, Doc("Column that holds the text or the messages, where a file or a hub data set is a table."), TEXT
    ] = "text"
    report_to: Annotated[
        str, Doc("Integrations of transformers' Trainer to report to, such as tensorboard; all or none."), TRAINING
    ] = "none"
    seed: Annotated[
        int, Doc("Random seed for selecting and ordering the text, and for fresh adapters."), at_least(0), TEXT
    ] = 0

    def __post_init__(self) -> None:
        """Check every field."""
        check_fields(self, "fine-tuning")

    @property
    def windows(self) -> int:
        """Windows of text that all steps take."""
        return self.steps * self.batch * self.accumulate

    @property
    def integrations(self) -> list[str]:
        """The names in ``report_to``."""
        return [name.strip() for name in self.report_to.split(",") if name.strip()]

    def deciding(self) -> dict[str, Any]:
        """The options that decide the result."""
        return {name: value for name, value in values_of(self).items() if name not in NOT_DECIDING}
