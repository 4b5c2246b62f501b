"""Stand-ins for the blocks of a model: run what is around the blocks, and learn how they are called."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparlow.errors import InputError
from sparlow.model.forward.arguments import Way, containers_in, leaves, parts, rebuilt
from sparlow.model.forward.block_pass import from_block, hidden_state, to_block
from sparlow.model.forward.calls import Given
from sparlow.model.forward.decoder import Decoder, output_head

NO_OPTIONS: Mapping[str, Tensor] = {}


@dataclass(frozen=True)
class Form:
    """What a block returns.

    Attributes:
        rest: An output with None in the place of its hidden state, and zeros in other tensors.
        axis: The dimension of a hidden state that counts windows; the next one counts tokens.
    """

    rest: Any
    axis: int

    def around(self, hidden: Tensor) -> Any:  # noqa: ANN401 - what a foreign forward returns
        """Return the output that has the hidden state (windows, seqlen, …)."""
        return _with_state(self.rest, to_block(hidden, self.axis))


@dataclass(frozen=True)
class FirstLook:
    """What one forward of a model shows in which the first block really runs.

    Attributes:
        form: Of what blocks return.
        hidden: What enters the first, as it has it.
        given: For each block the tensors that it was given, by the way to them; without those in containers that the
            first block wrote to.
    """

    form: Form
    hidden: Tensor
    given: list[dict[Way, Tensor]]

    def require_same(self, i: int, given: Given) -> None:
        """Raise InputError if block i is given something else where the blocks before it returned something else."""
        now = dict(leaves(given))
        for way, tensor in self.given[i].items():
            other = now.get(way)
            if not isinstance(other, Tensor) or not torch.equal(tensor, other):
                raise InputError(depends_on_blocks(i, way))


def first_look(
    model: PreTrainedModel,
    decoder: Decoder,
    ids: Tensor,
    options: Mapping[str, Tensor] = NO_OPTIONS,
    returned: Callable[[Any], None] = lambda _: None,
) -> FirstLook:
    """Run what is around the blocks and the first block, whose output stands for that of every other.

    Args:
        model: In eval mode; blocks behind the first may be on the meta device.
        decoder: Its blocks.
        ids: (windows, seqlen) int64, on the model's device.
        options: Of its forward.
        returned: Called with all that the first block returned or wrote into containers.

    Raises:
        InputError: The blocks are no chain that can be replayed.
    """
    forward = decoder.blocks[0].forward
    found: list[dict[Way, Tensor]] = []
    written: frozenset[int] = frozenset()
    output: Any = None
    hidden = torch.empty(0)

    def answer(i: int, x: Tensor, given: Given) -> Any:  # noqa: ANN401 - what a foreign forward returns
        nonlocal written, output, hidden
        found.append({way: leaf for way, leaf in leaves(given, without=written) if isinstance(leaf, Tensor)})
        if i == 0:
            hidden = x
            before = [(content, parts(content)) for content in containers_in(given)]
            output = forward(x, *given[0], **given[1])
            new = {id(content): _new_parts(old, parts(content)) for content, old in before}
            written = frozenset(key for key, found in new.items() if found)
            returned((output, new))
        return output

    modules = list(map(id, decoder.blocks.modules()))
    run_with_stand_ins(model, decoder, ids, answer, options)
    if list(map(id, decoder.blocks.modules())) != modules:
        raise InputError(
            "The model's code replaces modules of its blocks while it runs, so the blocks cannot be replayed one by "
            "one. Give a config with which it need not."
        )
    rest = rebuilt(_with_state(output, None), torch.zeros_like)
    return FirstLook(Form(rest, _axis(hidden, ids.shape)), hidden, found)


def run_around_blocks(
    model: PreTrainedModel,
    decoder: Decoder,
    ids: Tensor,
    form: Form,
    noted: Callable[[int, Tensor, Given], None],
) -> None:
    """Run what is around the blocks, which return what is nothing like their true output.

    Args:
        model: In eval mode; all blocks may be on the meta device.
        decoder: Its blocks.
        ids: (windows, seqlen) int64, on the model's device.
        form: Of what blocks return.
        noted: Told the number of each block, its hidden state as it has it, and what else it is given.

    Raises:
        InputError: The blocks are no chain that can be replayed.
    """
    output: Any = None

    def answer(i: int, x: Tensor, given: Given) -> Any:  # noqa: ANN401 - what a foreign forward returns
        nonlocal output
        noted(i, x, given)
        if i == 0:
            output = form.around(1 - from_block(x, form.axis))
        return output

    run_with_stand_ins(model, decoder, ids, answer, {})


def behind_blocks(
    model: PreTrainedModel, decoder: Decoder, ids: Tensor, options: Mapping[str, Tensor] = NO_OPTIONS
) -> tuple[Form, Tensor]:
    """Run a whole model, but not its head; return the form of what its last block gave, and its hidden state.

    Args:
        model: In the mode in which it shall run.
        decoder: Its blocks.
        ids: (windows, seqlen) int64, on the model's device.
        options: Of its forward.

    Raises:
        InputError: The last block is never called, or gives no hidden state of shape (windows, seqlen, …).
    """
    found: list[Any] = []
    hook = decoder.blocks[-1].register_forward_hook(lambda _module, _given, output: found.append(output))
    try:
        with ExitStack() as stack:
            head = output_head(model)
            if head is not None:
                stack.enter_context(forward_replaced(head, _stop))
            with suppress(_Stop):
                model(ids, use_cache=False, **options)
    finally:
        hook.remove()
    if len(found) != 1 or not isinstance(hidden_state(found[0]), Tensor):
        raise InputError("The last block is not called once, so the model's blocks are no chain. Give another model.")
    state = hidden_state(found[0])
    axis = _axis(state, ids.shape)
    if axis < 0:
        raise InputError("The last block gives no state of shape (windows, seqlen, features). Give another model.")
    rest = rebuilt(_with_state(found[0], None), torch.zeros_like)
    return Form(rest, axis), from_block(state, axis)


def _new_parts(old: Mapping[Any, Any], now: Mapping[Any, Any]) -> list[Any]:
    """Return what a container holds now and did not hold before."""
    return [part for key, part in now.items() if key not in old or old[key] is not part]


def depends_on_blocks(i: int, way: Way) -> str:
    """Return the sentence that refuses an argument of block i."""
    (_, part), (_, key), *_ = way
    name = f"Argument {key + 2}" if part == 0 else f"The argument {key}"  # the first is the hidden state
    return (
        f"{name} of block {i} depends on what the blocks before it compute, "
        "so the blocks cannot be replayed one by one."
    )


def _with_state(output: Any, state: Tensor | None) -> Any:  # noqa: ANN401 - what a foreign forward returns
    """Return the output of a block with another hidden state."""
    return type(output)((state, *output[1:])) if isinstance(output, tuple | list) else state


class _Stop(Exception):  # noqa: N818 - control flow of our own; never leaves this module
    """Leaves the model's forward early."""


def _stop(*_: Any, **__: Any) -> None:  # noqa: ANN401 - takes whatever the model gives
    raise _Stop


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module compute something else inside of this context."""
    before = module.__dict__.get("forward")  # set on the instance already, e.g. by accelerate's hooks
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


Answer = Callable[[int, Tensor, Given], Any]


def run_with_stand_ins(
    model: PreTrainedModel, decoder: Decoder, ids: Tensor, answer: Answer, options: Mapping[str, Tensor]
) -> None:
    """Run a model up to its head, each block giving ``answer`` of its number, hidden state and other arguments."""
    chain = _Chain(decoder, ids.shape, answer)
    with ExitStack() as stack:
        for i, block in enumerate(decoder.blocks):
            stack.enter_context(forward_replaced(block, chain.stand_in(i)))
        head = output_head(model)
        if head is not None:  # logits of whole windows would cost more than all the rest
            stack.enter_context(forward_replaced(head, _stop))
        with suppress(_Stop):
            model(ids, use_cache=False, **options)
    if chain.turn != len(decoder):
        raise InputError(f"Block {chain.turn} is never called, but the blocks must be called one after the other.")


class _Chain:
    """Stands in for the blocks during one forward, and checks that they are called one after the other."""

    def __init__(self, decoder: Decoder, shape: torch.Size, answer: Answer) -> None:
        self._shape, self._answer = shape, answer
        self._name = next(iter(inspect.signature(decoder.blocks[0].forward).parameters))  # of the hidden state
        self._state: Tensor | None = None  # what the block before returned
        self.turn = 0  # the block that comes next

    def stand_in(self, i: int) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - a foreign forward's arguments
            if i != self.turn:
                raise InputError(f"Block {i} is called where block {self.turn} is due, so the blocks are not a chain.")
            x = args[0] if args else kwargs.pop(self._name, None)
            if not isinstance(x, Tensor) or _axis(x, self._shape) < 0:
                raise InputError(f"Block {i} is not called with a hidden state of shape (windows, seqlen, features).")
            if self._state is not None and not _same(x, self._state):
                raise InputError(f"The model changes the hidden state between blocks {i - 1} and {i}.")
            output = self._answer(i, x, (args[1:], kwargs))
            self._state = hidden_state(output)
            self.turn += 1
            return output

        return call


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.shape == other.shape and (one.is_meta or torch.equal(one, other)))


def _axis(x: Tensor, shape: torch.Size) -> int:
    """The dimension of a hidden state that counts windows, the next one counting tokens; -1 if there is none."""
    return next((i for i in range(x.ndim - 2) if x.shape[i : i + 2] == shape), -1)
