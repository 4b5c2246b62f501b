"""The loss of fine-tuning without the logits of a whole batch.

transformers' own loss has the logits of all tokens of a batch in memory several times: 5 GB each for 8 × 1024 tokens
and a vocabulary of 150,000. The head treats every token alike, so logits are taken a few tokens at a time, wherever it
can be run apart from the blocks.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from sparlow.errors import InputError
from sparlow.model.forward.capture import run_head, tokens_at_once
from sparlow.model.forward.decoder import Decoder
from sparlow.model.forward.stand_ins import behind_blocks
from sparlow.model.loading.objects import in_eval_mode
from sparlow.model.training.logit_pieces import PIECES, summed_in_pieces
from sparlow.text.answers import IGNORED

LOOKED_AT = 16  # tokens of which is seen whether the loss can be had in pieces
TOLERANCE = 1e-4  # of the loss: less than what models add to it, such as a term for the balance of experts


def needs_pieces(model: PreTrainedModel, ids: Tensor) -> bool:
    """Whether the logits of a batch (b, n) are more than may be in memory at once."""
    return tokens_at_once(model, len(ids) * PIECES) < ids.shape[1]


def loss_in_pieces(
    model: PreTrainedModel, ids: Tensor, labels: Tensor, options: Mapping[str, Tensor], count: float | Tensor
) -> Tensor:
    """Return the negative log-likelihood of the labels, added up and divided by ``count``, with its gradient.

    Args:
        model: In the mode in which it shall run.
        ids: (b, n) int64, on the model's device.
        labels: (b, n), the same or ``IGNORED``; each is what the token before it is to predict.
        options: Of the model's forward, such as the attention mask.
        count: What the sum is divided by.
    """
    form, left = behind_blocks(model, Decoder.of(model), ids, options)
    after = functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]  # (b, n)

    def part(piece: Tensor, at: slice) -> Tensor:
        logits = run_head(model, form, ids[:, at], piece).float().flatten(0, 1)
        wanted = after[:, at].flatten().to(logits.device)
        return functional.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum")

    return summed_in_pieces(left, tokens_at_once(model, len(ids) * PIECES), part, count)


@torch.no_grad()
def is_own_loss(model: PreTrainedModel, ids: Tensor) -> bool:
    """Whether the loss in pieces is the model's own. That is tried, on a few tokens of ``ids`` (b, n)."""
    some = ids[:1, :LOOKED_AT]
    with in_eval_mode(model):
        own = model(some, labels=some, use_cache=False).loss.float()
        try:
            found = loss_in_pieces(model, some, some, {}, some.shape[1] - 1)
        except InputError:  # no chain of blocks, which is no fault of a model that is trained as a whole
            return False
    return bool((found - own).abs() <= TOLERANCE * own.abs())
