"""lm-eval's wrapper of a model, of which a batch has no more rows than its logits leave room for.

lm-eval has the logits of all positions of a batch in memory, and their logarithms beside them, though it looks only at
those of an answer. Questions of a length share a batch there, so long ones come in fewer rows.
"""

from collections.abc import Sequence
from typing import Any

from lm_eval.models.huggingface import HFLM

LOGITS_OF_BATCH = 2**28  # elements, or those of one row: 1 GB in float32, and as much for the logarithms

Request = tuple[tuple[str, str], list[int], list[int]]  # the question in words, its tokens, those of an answer


class BoundedHarness(HFLM):  # type: ignore[misc]  # untyped in lm-eval
    """As ``HFLM``, with batches of ``batch_size`` rows at most."""

    batch_size_per_gpu: int

    def _loglikelihood_tokens(
        self,
        requests: Sequence[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[Any]:
        asked = self.batch_size_per_gpu
        by_rows: dict[int, list[int]] = {}  # those that share a context are of one length, and stay together
        for i, (_, context, answer) in enumerate(requests):
            rows = rows_at_once(self.model, min(len(context) + len(answer), self.max_length))
            by_rows.setdefault(min(rows, asked), []).append(i)
        found: list[Any] = [None] * len(requests)
        try:
            for rows, group in by_rows.items():
                self.batch_size_per_gpu = rows
                answers = super()._loglikelihood_tokens([requests[i] for i in group], disable_tqdm, override_bs)
                for i, answer in zip(group, answers, strict=True):
                    found[i] = answer
        finally:
            self.batch_size_per_gpu = asked
        return found


def rows_at_once(model: Any, tokens: int) -> int:  # noqa: ANN401 - a PreTrainedModel, or what PEFT makes of it
    """Return how many rows of so many tokens a batch may have."""
    words: int = model.config.get_text_config().vocab_size
    return max(LOGITS_OF_BATCH // (words * tokens), 1)
