"""Learn what enters the chain of decoder blocks, and how each block is called.

``run_head`` goes the rest of the way: from what leaves the last block to the logits.

Masks and rotary tables differ from block to block, so every block's own are kept; the model is checked to be a chain.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparlow.distributed import ALONE, Processes
from sparlow.errors import InputError
from sparlow.model.forward.activation_store import ActivationStore
from sparlow.model.forward.decoder import Call, decoder_blocks, hidden_state, output_head, tensors_in

LOGITS_AT_ONCE = 2**24  # numbers: 64 MB in float32


@dataclass(frozen=True)
class Recording:
    """What enters the chain of blocks, and how each block is called.

    Attributes:
        hidden: inputs of block 0, one (windows, seqlen, d) tensor a micro-batch; of several processes each has its
            rows of every one, which may be none.
        ids: the tokens they come from, (windows, seqlen) int64 each.
        calls: for each block its call by number of windows in a micro-batch (the last one may be smaller).
        output: the form of what a block returns, without its hidden state.
    """

    hidden: ActivationStore
    ids: list[Tensor]
    calls: list[dict[int, Call]]
    output: Any = None


@torch.no_grad()
def capture_block_inputs(
    model: PreTrainedModel,
    windows: Tensor,
    *,
    micro_batch: int,
    apart: int = 0,
    place: torch.device | str | None = None,
    processes: Processes = ALONE,
) -> Recording:
    """Run everything in front of the blocks, and of the blocks only the first.

    The other blocks only pass their hidden state on, so their weights may be on the meta device.

    Args:
        model: in eval mode.
        windows: (n, seqlen) int64 token ids.
        micro_batch: windows at a time.
        apart: so many windows at the end make a micro-batch of their own.
        place: where hidden states are kept, see ``activation_store.ActivationStore``; where the model lies if left out.
        processes: those that divide every micro-batch.

    Raises:
        InputError: the blocks are no chain that can be replayed.
    """
    _, blocks = decoder_blocks(model)
    device = next(model.get_input_embeddings().parameters()).device
    recorder = _Recorder(blocks, ActivationStore(device if place is None else place))
    with ExitStack() as stack:
        for i, block in enumerate(blocks):
            stack.enter_context(_forward_replaced(block, recorder.stand_in(i, block.forward)))
        head = output_head(model)
        if head is not None:  # logits of whole windows would cost more than all the rest
            stack.enter_context(_forward_replaced(head, _stop))
        together = len(windows) - apart
        own = []
        for batch in (*windows[:together].split(micro_batch), *((windows[together:],) if apart else ())):
            ids = processes.local_rows(batch)
            own.append(ids)
            seen = ids if len(ids) else batch[:1]  # where there is nothing to keep, its form is still learnt
            recorder.begin(seen, keep=len(ids))
            with suppress(_Stop):
                model(seen.to(device), use_cache=False)
            recorder.end()
    return Recording(recorder.hidden, own, recorder.calls, recorder.output)


def run_head(model: PreTrainedModel, output: Any, ids: Tensor, hidden: Tensor) -> Tensor:  # noqa: ANN401 - foreign
    """Return the logits (b, n, vocabulary); blocks are not run, and may be on the meta device; gradients flow.

    What is behind the blocks looks at each token by itself, so any n tokens will do, the context need not be there.

    Args:
        model: in eval mode.
        output: of a ``Recording``.
        ids: (b, n) int64 token ids.
        hidden: (b, n, d) what the last block gave for them, on any device.
    """
    device = next(model.get_input_embeddings().parameters()).device
    state = hidden.to(device)
    with ExitStack() as stack:
        for block in decoder_blocks(model)[1]:
            stack.enter_context(_forward_replaced(block, lambda *_, **__: _with_state(output, state)))
        logits: Tensor = model(ids.to(device), use_cache=False).logits
        return logits


def tokens_at_once(model: PreTrainedModel, windows: int) -> int:
    """Return how many tokens of each of so many windows may have their logits in memory together."""
    words: int = model.config.get_text_config().vocab_size
    return max(LOGITS_AT_ONCE // (words * windows), 1)


def _with_state(output: Any, state: Tensor | None) -> Any:  # noqa: ANN401 - what a foreign forward returns
    """Return the output of a block with another hidden state."""
    return type(output)((state, *output[1:])) if isinstance(output, tuple | list) else state


class _Stop(Exception):  # noqa: N818 - control flow of our own; never leaves this module
    """Leaves the model's forward early."""


def _stop(*_: Any, **__: Any) -> None:  # noqa: ANN401 - takes whatever the model gives
    raise _Stop


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = module.__dict__.get("forward")  # set on the instance already, e.g. by accelerate's hooks
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


class _Recorder:
    """Stands in for the blocks of a model and notes how they are called.

    Two micro-batches of each size go through the whole chain: the second shows that nothing depends on the text.
    Of later ones only what enters block 0 is kept.
    """

    def __init__(self, blocks: nn.ModuleList, hidden: ActivationStore) -> None:
        self.hidden = hidden
        self.calls: list[dict[int, Call]] = [{} for _ in blocks]
        self._output: Any = None  # what block 0 returned, and what every other block returns
        self._state = torch.empty(0)  # the hidden state in it
        self._name = next(iter(inspect.signature(blocks[0].forward).parameters))  # of the hidden state
        self._runs: dict[int, int] = {}  # micro-batches of this size so far

    @property
    def output(self) -> Any:  # noqa: ANN401 - what a foreign forward returns
        return _with_state(self._output, None)

    def begin(self, ids: Tensor, keep: int) -> None:
        self._shape, self._keep = ids.shape, keep
        self._runs[len(ids)] = self._runs.get(len(ids), 0) + 1
        self._next = 0  # the block whose turn it is

    def end(self) -> None:
        if self._next not in (0, len(self.calls)) or len(self.hidden) != sum(self._runs.values()):
            raise InputError(f"block {self._next} is never called: the model's blocks are no chain")

    def stand_in(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - a foreign forward's arguments
            x, rest = self._split(index, args, kwargs)
            if index == 0 and self._next == 0:
                self.hidden.append(x[: self._keep])
                if self._runs[len(x)] > 2:  # noqa: PLR2004 - see the class
                    raise _Stop
                self._output = forward(*args, **kwargs)
                self._state = hidden_state(self._output)
            elif index != self._next:
                raise InputError(f"block {index} is called where block {self._next} was expected: no chain of blocks")
            elif x is not self._state and not torch.equal(x, self._state):
                raise InputError(f"the model changes the hidden state between blocks {index - 1} and {index}")
            self._note(index, len(x), rest)
            self._next += 1
            return self._output

        return call

    def _split(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
        kwargs = dict(kwargs)
        x = args[0] if args else kwargs.pop(self._name, None)
        if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[:2] != self._shape:  # noqa: PLR2004 - (b, seqlen, d)
            raise InputError(f"block {index} is not called with a hidden state of shape (windows, seqlen, features)")
        return x, Call(args[1:], kwargs)

    def _note(self, index: int, size: int, call: Call) -> None:
        first = self.calls[index].setdefault(size, call).named()
        for name, value in call.named().items():
            old, new = list(tensors_in(first.get(name))), list(tensors_in(value))
            if len(old) != len(new) or not all(map(torch.equal, old, new)):
                raise InputError(f"{name} of block {index} depends on the text, so the block cannot be replayed")
