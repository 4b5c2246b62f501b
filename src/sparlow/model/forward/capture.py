"""Learn what enters the chain of decoder blocks, and how each block is called for each micro-batch.

``run_head`` goes the rest of the way: from what leaves the last block to the logits.

The model runs with its blocks replaced by stand-ins, so that only what is around them is computed. It is checked to be
a chain: each block is called once, in order, with what the block before it gave, and with nothing else that depends on
what blocks compute. What depends on the text alone is noted for each micro-batch, see ``calls``.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparlow.distributed import ALONE, Processes
from sparlow.model.forward.activation_store import ActivationStore
from sparlow.model.forward.block_pass import from_block
from sparlow.model.forward.calls import BlockCalls, CallRecorder, Given
from sparlow.model.forward.decoder import Decoder
from sparlow.model.forward.stand_ins import FirstLook, Form, first_look, forward_replaced, run_around_blocks

LOGITS_AT_ONCE = 2**24  # numbers: 64 MB in float32


@dataclass(frozen=True)
class Recording:
    """What enters the chain of blocks, and how each block is called.

    Attributes:
        hidden: inputs of block 0, one (windows, seqlen, …) tensor a micro-batch; of several processes each has its
            rows of every one, which may be none.
        ids: the tokens they come from, (windows, seqlen) int64 each.
        calls: of each block, by micro-batch.
        output: the form of what a block returns, for ``run_head``.
    """

    hidden: ActivationStore
    ids: list[Tensor]
    calls: list[BlockCalls]
    output: Form


@torch.no_grad()
def capture_block_inputs(
    model: PreTrainedModel,
    windows: Tensor,
    *,
    micro_batch: int,
    apart: int = 0,
    place: torch.device | str | Path | None = None,
    processes: Processes = ALONE,
) -> Recording:
    """Run everything in front of the blocks, and of the blocks only the first, once for each size of a micro-batch.

    The other blocks only pass their hidden state on, so their weights may be on the meta device.

    Args:
        model: in eval mode.
        windows: (n, seqlen) int64 token ids.
        micro_batch: windows at a time.
        apart: so many windows at the end share no micro-batch with others.
        place: where hidden states are kept, see ``activation_store.ActivationStore``; where the model lies if left out.
        processes: those that divide every micro-batch.

    Raises:
        InputError: the blocks are no chain that can be replayed.
    """
    decoder = Decoder.of(model)
    device = next(model.get_input_embeddings().parameters()).device
    hidden = ActivationStore(device if place is None else place)
    recorder = CallRecorder(len(decoder), hidden.fresh())
    own, looks = [], dict[int, FirstLook]()
    for batch in _micro_batches(windows, micro_batch, apart):
        ids = processes.local_rows(batch)
        own.append(ids)
        seen = (ids if len(ids) else batch[:1]).to(device)  # where there is nothing to keep, its form is still learnt
        new = len(seen) not in looks
        look = looks[len(seen)] = first_look(model, decoder, seen) if new else looks[len(seen)]
        recorder.begin(len(seen))

        def noted(i: int, x: Tensor, given: Given) -> None:
            if i == 0:
                hidden.append(from_block(x, look.form.axis)[: len(ids)])  # noqa: B023 - called within this round
            if new:  # noqa: B023 - the same
                look.require_same(i, given)  # noqa: B023 - the same
            recorder.note(given, look.form.axis)  # noqa: B023 - the same

        run_around_blocks(model, decoder, seen, look.form, noted)
        recorder.end()
    return Recording(hidden, own, recorder.calls, look.form)


def run_head(model: PreTrainedModel, output: Form, ids: Tensor, hidden: Tensor) -> Tensor:
    """Return the logits (b, n, vocabulary); blocks are not run, and may be on the meta device; gradients flow.

    What is behind the blocks looks at each token by itself, so any n tokens will do, the context need not be there.

    Args:
        model: in eval mode.
        output: of a ``Recording``.
        ids: (b, n) int64 token ids.
        hidden: (b, n, …) what the last block gave for them, on any device.
    """
    device = next(model.get_input_embeddings().parameters()).device
    state = output.around(hidden.to(device))
    with ExitStack() as stack:
        for block in Decoder.of(model).blocks:
            stack.enter_context(forward_replaced(block, lambda *_, **__: state))
        logits: Tensor = model(ids.to(device), use_cache=False).logits
        return logits


def tokens_at_once(model: PreTrainedModel, windows: int) -> int:
    """Return how many tokens of each of so many windows may have their logits in memory together."""
    words: int = model.config.get_text_config().vocab_size
    return max(LOGITS_AT_ONCE // (words * windows), 1)


def _micro_batches(windows: Tensor, size: int, apart: int) -> Iterator[Tensor]:
    together = len(windows) - apart
    yield from windows[:together].split(size)
    if apart:
        yield from windows[together:].split(size)
