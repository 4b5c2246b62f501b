"""Capture the inputs of the first decoder block, and the arguments of every block, for each micro-batch.

``run_head`` computes the logits from the output of the last block.

The model runs with its blocks replaced by stand-ins, so that only the code around them is computed. This also checks
that the blocks are a chain: each is called once, in order, with the output of the block before it, and with no other
argument that depends on what blocks compute. Arguments that depend on the text alone are kept for each micro-batch, see
``calls``.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparlow.distributed import ALONE, Processes
from sparlow.model import _transformers as private
from sparlow.model.forward.activation_store import ActivationStore
from sparlow.model.forward.block_pass import from_block
from sparlow.model.forward.calls import BlockCalls, CallRecorder, Given
from sparlow.model.forward.decoder import Decoder
from sparlow.model.forward.stand_ins import FirstLook, Form, first_look, forward_replaced, run_around_blocks

LOGITS_AT_ONCE = 2**24  # elements: 64 MB in float32


@dataclass(frozen=True)
class Recording:
    """The inputs of the first block, and the arguments of every block.

    Attributes:
        hidden: Inputs of block 0, one (windows, seqlen, …) tensor for each micro-batch. Each process holds its own
            rows of each, which may be none.
        ids: The tokens they come from, (windows, seqlen) int64 each.
        calls: The arguments of each block, by micro-batch.
        output: The form of what a block returns, for ``run_head``.
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
    """Run the part of the model before the blocks on all windows, and the first block once for each micro-batch size.

    The other blocks are not run, so their weights may be on the meta device.

    Args:
        model: In eval mode.
        windows: (n, seqlen) int64 token ids.
        micro_batch: Number of windows in each micro-batch.
        apart: The last so many windows share no micro-batch with others.
        place: Where hidden states are kept, see ``activation_store.ActivationStore``; where the model lies if left out.
        processes: The processes that divide every micro-batch.

    Raises:
        InputError: The blocks are not a chain that can be replayed.
    """
    decoder = Decoder.of(model)
    device = next(model.get_input_embeddings().parameters()).device
    hidden = ActivationStore(device if place is None else place)
    recorder = CallRecorder(len(decoder), hidden.fresh())
    own, looks = [], dict[int, FirstLook]()
    for batch in _micro_batches(windows, micro_batch, apart):
        ids = processes.local_rows(batch)
        own.append(ids)
        seen = (ids if len(ids) else batch[:1]).to(device)  # a process without windows still learns the form
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
    """Return the logits (b, n, vocabulary), with gradients. Blocks are not run, and may be on the meta device.

    The head treats each token independently, so the n tokens may be any subset of a context.

    Args:
        model: In eval mode.
        output: ``Recording.output``.
        ids: (b, n) int64 token ids.
        hidden: (b, n, …) the output of the last block for them, on any device.
    """
    device = next(model.get_input_embeddings().parameters()).device
    state = output.around(hidden.to(device))
    with ExitStack() as stack:
        stack.enter_context(_logits_alone(model))
        stack.enter_context(private.texts_of_their_own())
        for block in Decoder.of(model).blocks:
            stack.enter_context(forward_replaced(block, lambda *_, **__: state))
        logits: Tensor = model(ids.to(device), use_cache=False).logits
        return logits


@contextmanager
def _logits_alone(model: PreTrainedModel) -> Iterator[None]:
    """Let a model give nothing but logits within this context: what else its config asks for, blocks would give.

    Such as a term for the balance of experts, which fails where none of them runs.
    """
    configs = {id(one): one for one in (model.config, model.config.get_text_config())}.values()
    names = ((one, name) for one in configs for name in vars(one) if name.startswith("output_"))
    asked = [(one, name) for one, name in names if getattr(one, name) is True]
    for one, name in asked:
        setattr(one, name, False)
    try:
        yield
    finally:
        for one, name in asked:
            setattr(one, name, True)


def tokens_at_once(model: PreTrainedModel, windows: int) -> int:
    """Return how many tokens of each window may have their logits in memory at once, for this number of windows."""
    words: int = model.config.get_text_config().vocab_size
    return max(LOGITS_AT_ONCE // (words * windows), 1)


def _micro_batches(windows: Tensor, size: int, apart: int) -> Iterator[Tensor]:
    together = len(windows) - apart
    yield from windows[:together].split(size)
    if apart:
        yield from windows[together:].split(size)
