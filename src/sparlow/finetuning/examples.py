"""What fine-tuning reads: tokens, and labels for those of them that take part in the loss."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from sparlow.errors import InputError
from sparlow.finetuning.options import FinetuneOptions
from sparlow.text import beginning, chat_column, fingerprint, training_chats, training_windows
from sparlow.text.answers import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Examples(Dataset[dict[str, Tensor]]):
    """Windows of a text, all of one length and learnt as a whole, or chats, of which the answers are learnt.

    Attributes:
        ids: Token ids of each example (tokens,) int64.
        labels: The same, or ``IGNORED``; the model shifts them itself.
        chats: Of chats what was learnt and what was not: answer tokens, tokens, cut, left out.
    """

    ids: Sequence[Tensor]
    labels: Sequence[Tensor]
    chats: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of_windows(cls, windows: Tensor) -> "Examples":
        """Windows (n, tokens), learnt as a whole."""
        return cls([*windows], [*windows])

    @classmethod
    def read(cls, plan: FinetuneOptions, tokenizer: "PreTrainedTokenizerBase") -> "Examples":
        """Read what a plan names: chats where its records hold messages, else text.

        Raises:
            InputError: It cannot be read.
        """
        sizes = {"samples": plan.windows, "seqlen": plan.block_size, "seed": plan.seed}
        column = chat_column(plan.dataset, plan.column)
        if column is None:
            begin = beginning(tokenizer, plan.bos)
            return cls.of_windows(training_windows(plan.dataset, tokenizer, begin=begin, column=plan.column, **sizes))
        if plan.bos != FinetuneOptions.bos:
            raise InputError("--bos is for plain text, and a chat begins as the chat template says. Leave it out.")
        found = training_chats(plan.dataset, column, tokenizer, **sizes)
        answers = sum(int((of[1:] != IGNORED).sum()) for of in found.labels)
        counts = {"answer_tokens": answers, "tokens": sum(map(len, found.ids))}
        return cls(found.ids, found.labels, counts | {"cut": found.cut, "left_out": found.left_out})

    def __len__(self) -> int:
        """How many there are."""
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One of them, as Trainer wants it."""
        return {"input_ids": self.ids[index], "labels": self.labels[index]}

    @property
    def all_ids(self) -> Tensor:
        """Every token id (tokens,)."""
        return torch.cat([*self.ids])

    @property
    def fingerprint(self) -> str:
        """Sha256, in hex, of what decides the result."""
        if not self.chats:
            return fingerprint(torch.stack([*self.ids]))
        sizes = torch.tensor([len(one) for one in self.ids])
        return fingerprint(torch.cat([sizes, *self.ids, *self.labels])[None])

    def warnings(self, block_size: int) -> list[str]:
        """Sentences for the report on chats that were not learnt as they stand."""
        cut, left_out = self.chats.get("cut", 0), self.chats.get("left_out", 0)
        found = []
        if cut:
            found.append(f"{cut:,} chats are longer than {block_size:,} tokens, and were cut there.")
        if left_out:
            found.append(
                f"{left_out:,} chats have no answer within their first {block_size:,} tokens, and were left out."
            )
        return found


def together(examples: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
    """A batch; shorter examples are filled up behind their end, where nothing that is learnt looks.

    Args:
        examples: As ``Examples`` gives them.
    """
    ids, labels = ([one[name] for one in examples] for name in ("input_ids", "labels"))
    batch = {
        "input_ids": pad_sequence(ids, batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }
    if len({len(one) for one in ids}) > 1:
        batch["attention_mask"] = pad_sequence([torch.ones_like(one) for one in ids], batch_first=True)
    return batch
