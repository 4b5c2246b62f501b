"""Walk a causal LM block by block, knowing nothing of any architecture.

A decoder is a chain: embedding → block 0 → block 1 → … → norm and head. ``record`` learns what enters block 0 and
what every block is called with besides its hidden state (masks, rotary tables: they differ from block to block), and
checks that the model is such a chain; from then on ``run_block`` and ``observe`` need one block at a time.
"""

import copy
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparlow.errors import InputError

_WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Statistic(Protocol):
    """Anything that accumulates inputs of a linear layer."""

    def add(self, x: Tensor, /) -> None:
        """Take in one input of shape (..., in)."""


Kind = TypeVar("Kind", bound=Statistic)


def decoder_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the qualified name and the list of the decoder's blocks.

    Raises:
        InputError: no ModuleList of the decoder, or more than one, is ``num_hidden_layers`` long.
    """
    depth = model.config.get_text_config().num_hidden_layers
    untyped: Any = model  # transformers does not annotate this method
    inside = set(untyped.get_decoder().modules())  # the towers of other modalities may be as deep
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        nested = any(name.startswith(f"{outer}.") for outer in found)  # e.g. two experts in each of two blocks
        if isinstance(module, nn.ModuleList) and module in inside and len(module) == depth and not nested:
            found[name] = module
    if len(found) != 1:
        names = f": {', '.join(found)}" if found else ""
        raise InputError(f"expected one list of {depth} decoder blocks, found {len(found)}{names}")
    return next(iter(found.items()))


def linears(block: nn.Module) -> dict[str, nn.Linear]:
    """Return a block's layers that compute ``x Wᵀ + b`` and nothing else, by name, in module order."""
    return {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear) and _is_plain(m)}


def _is_plain(linear: nn.Linear) -> bool:
    W = linear.weight
    if W.shape != (linear.out_features, linear.in_features) or W.dtype not in _WEIGHT_DTYPES:
        return False  # quantised or packed
    if type(linear).forward is nn.Linear.forward:
        return True
    # A subclass with its own forward (a router that also selects, grouped outputs, …) is asked with a small weight
    # of its own, so that the answer does not need the layer's weights, which may not be loaded.
    probe = copy.copy(linear)
    small = nn.Linear(3, 4, bias=linear.bias is not None)
    probe.__dict__["_parameters"] = {"weight": small.weight, "bias": small.bias}
    x = torch.linspace(-1, 1, 6).reshape(1, 2, 3)
    with torch.no_grad():
        try:
            y = type(linear).forward(probe, x)
        except Exception:  # noqa: BLE001 - a foreign forward may fail in any way, and then is not a plain linear
            return False
        return isinstance(y, Tensor) and y.shape == (1, 2, 4) and torch.allclose(y, small(x), atol=1e-6)


@dataclass(frozen=True)
class Skipped:
    """A module whose own parameters stay as they are."""

    name: str
    parameters: int
    why: str


def not_compressed(model: PreTrainedModel, compressed: Collection[str]) -> list[Skipped]:
    """List every module with parameters of its own outside the modules named in ``compressed``.

    Each parameter of the model, tied ones once, is in a compressed module or in exactly one row.
    """
    seen = {p for name in compressed for p in model.get_submodule(name).parameters()}
    rows = []
    for name, module in model.named_modules():
        own = set(module.parameters(recurse=False)) - seen
        if own:
            seen |= own
            rows.append(Skipped(name or "(the model itself)", sum(p.numel() for p in own), _why(model, module, own)))
    return rows


def _output_head(model: PreTrainedModel) -> nn.Module | None:
    untyped: Any = model  # transformers does not annotate this method
    head: nn.Module | None = untyped.get_output_embeddings()
    return head


def _why(model: PreTrainedModel, module: nn.Module, own: Collection[nn.Parameter]) -> str:
    head = _output_head(model)
    if module is head:
        return "output head"
    if isinstance(module, nn.Embedding):
        return "embedding and output head, tied" if head is not None and head.weight in own else "embedding"
    if isinstance(module, nn.Linear) and _is_plain(module):
        return "linear layer that was not selected"
    if all(p.ndim <= 1 for p in own):
        return "norm or bias"
    return f"weights of {type(module).__name__}, not a plain linear layer"


@dataclass(frozen=True)
class Call:
    """What a block is called with, after its hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def to(self, device: torch.device) -> "Call":
        """Return the call with its tensors on ``device``."""
        return Call(_moved(self.args, device), _moved(self.kwargs, device))

    def named(self) -> dict[str, Any]:
        """Return positional and keyword arguments in one, for messages."""
        return {f"argument {i}": value for i, value in enumerate(self.args, 2)} | self.kwargs


def _moved(value: Any, device: torch.device) -> Any:  # noqa: ANN401 - arguments of a foreign forward
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(_moved(v, device) for v in value)
    if type(value) is dict:
        return {k: _moved(v, device) for k, v in value.items()}
    return value


def _tensors(value: Any) -> Iterator[Tensor]:  # noqa: ANN401 - arguments of a foreign forward
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list | dict):
        for v in value.values() if isinstance(value, dict) else value:
            yield from _tensors(v)


@dataclass(frozen=True)
class Recording:
    """What enters the chain of blocks, and how each block is called.

    Attributes:
        hidden: inputs of block 0, one (windows, seqlen, d) tensor a micro-batch.
        calls: for each block its call by number of windows in a micro-batch (the last one may be smaller).
    """

    hidden: list[Tensor]
    calls: list[dict[int, Call]]


@torch.no_grad()
def record(model: PreTrainedModel, windows: Tensor, *, micro_batch: int) -> Recording:
    """Run everything in front of the blocks, and of the blocks only the first.

    The other blocks only pass their hidden state on, so their weights may be on the meta device.

    Args:
        model: in eval mode.
        windows: (n, seqlen) int64 token ids.
        micro_batch: windows at a time.

    Raises:
        InputError: the blocks are no chain that can be replayed.
    """
    _, blocks = decoder_blocks(model)
    recorder = _Recorder(blocks)
    device = next(model.get_input_embeddings().parameters()).device
    with ExitStack() as stack:
        for i, block in enumerate(blocks):
            stack.enter_context(_forward_replaced(block, recorder.stand_in(i, block.forward)))
        head = _output_head(model)
        if head is not None:  # logits of whole windows would cost more than all the rest
            stack.enter_context(_forward_replaced(head, _stop))
        for ids in torch.split(windows, micro_batch):
            recorder.begin(ids)
            with suppress(_Stop):
                model(ids.to(device), use_cache=False)
            recorder.end()
    return Recording(recorder.hidden, recorder.calls)


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

    def __init__(self, blocks: nn.ModuleList) -> None:
        self.hidden: list[Tensor] = []
        self.calls: list[dict[int, Call]] = [{} for _ in blocks]
        self._output: Any = None  # what block 0 returned, and what every other block returns
        self._state = torch.empty(0)  # the hidden state in it
        self._name = next(iter(inspect.signature(blocks[0].forward).parameters))  # of the hidden state
        self._runs: dict[int, int] = {}  # micro-batches of this size so far

    def begin(self, ids: Tensor) -> None:
        self._shape = ids.shape
        self._runs[len(ids)] = self._runs.get(len(ids), 0) + 1
        self._next = 0  # the block whose turn it is

    def end(self) -> None:
        if self._next not in (0, len(self.calls)) or len(self.hidden) != sum(self._runs.values()):
            raise InputError(f"block {self._next} is never called: the model's blocks are no chain")

    def stand_in(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - a foreign forward's arguments
            x, rest = self._split(index, args, kwargs)
            if index == 0 and self._next == 0:
                self.hidden.append(x)
                if self._runs[len(x)] > 2:  # noqa: PLR2004 - see the class
                    raise _Stop
                self._output = forward(*args, **kwargs)
                self._state = _hidden_state(self._output)
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
            old, new = list(_tensors(first.get(name))), list(_tensors(value))
            if len(old) != len(new) or not all(map(torch.equal, old, new)):
                raise InputError(f"{name} of block {index} depends on the text, so the block cannot be replayed")


def run_block(block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    """Return the block's hidden state (b, seqlen, d), on the block's device; gradients flow.

    Args:
        hidden: (b, seqlen, d), on any device.
        call: what ``record`` noted for this block and b windows.
    """
    device = next(block.parameters()).device
    call = call.to(device)
    return _hidden_state(block(hidden.to(device), *call.args, **call.kwargs))


def _hidden_state(output: Any) -> Tensor:  # noqa: ANN401 - what a foreign forward returns
    state: Tensor = output[0] if isinstance(output, tuple | list) else output
    return state


@dataclass(frozen=True)
class Observation(Generic[Kind]):
    """What one pass of a block shows.

    Attributes:
        outputs: (b, seqlen, d) for each micro-batch, where its input lies.
        statistics: one for each distinct input, under the name of the first linear that reads it.
        owner: for each linear the name its statistic has; a linear that is never called has none.
    """

    outputs: list[Tensor]
    statistics: dict[str, Kind]
    owner: dict[str, str]


@torch.no_grad()
def observe(
    block: nn.Module,
    calls: Mapping[int, Call],
    hidden: Iterable[Tensor],
    new_statistic: Callable[[int, torch.device], Kind],
    *,
    label: str = "block",
) -> Observation[Kind]:
    """Run a block once over all micro-batches for both its outputs and the statistics of its linears' inputs.

    Linears that read the very same tensors (query, key and value; gate and up) share one statistic.

    Args:
        calls: the block's calls by number of windows, from ``record``.
        hidden: the block's inputs, (b, seqlen, d) each.
        new_statistic: makes an empty statistic of inputs (..., in) from ``in`` and their device.
        label: how errors call the block.

    Raises:
        InputError: an output is not finite; the message names the first layer concerned.
    """
    device = next(block.parameters()).device
    calls = {size: call.to(device) for size, call in calls.items()}
    seen: Observation[Kind] = Observation([], {}, {})
    for x in hidden:
        with _inputs_noted(block, label) as inputs:
            y = run_block(block, x, calls[len(x)])
        if not y.isfinite().all():
            raise InputError(
                f"{label}: {_not_finite(block, inputs)} is not finite (NaN or inf); "
                "use --dtype float32 or check the model's weights"
            )
        seen.outputs.append(y.to(x.device))
        _add(seen, inputs, new_statistic)
    return seen


@contextmanager
def _inputs_noted(block: nn.Module, label: str) -> Iterator[dict[str, list[Tensor]]]:
    """Collect what each linear reads, in the order of the calls; kept alive, so that identities stay distinct."""
    inputs: dict[str, list[Tensor]] = {}
    versions: list[tuple[str, Tensor, int]] = []

    def hook(name: str) -> Callable[..., None]:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            inputs.setdefault(name, []).append(x)
            versions.append((name, x, x._version))  # noqa: SLF001 - how torch counts changes in place

        return note

    with ExitStack() as stack:
        for name, linear in linears(block).items():
            stack.enter_context(linear.register_forward_pre_hook(hook(name), with_kwargs=True))
        yield inputs
    for name, x, version in versions:  # statistics are taken now, after the forward
        if x._version != version:  # noqa: SLF001 - see above
            raise InputError(f"{label} changes the input of {name} in place, so it cannot be observed")


def _add(
    seen: Observation[Kind], inputs: Mapping[str, list[Tensor]], new_statistic: Callable[[int, torch.device], Kind]
) -> None:
    """Add one forward's inputs; who shared a statistic so far but now reads something else goes on with a copy."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name in dict.fromkeys([*seen.owner, *inputs]):
        key = (seen.owner.get(name), *map(id, inputs.get(name, ())))
        groups.setdefault(key, []).append(name)
    for (before, *_), names in groups.items():
        if before is None:
            x = inputs[names[0]][0]
            seen.statistics[names[0]] = new_statistic(x.shape[-1], x.device)
        elif names[0] != before:
            seen.statistics[names[0]] = copy.deepcopy(seen.statistics[before])
        seen.owner.update(dict.fromkeys(names, names[0]))
    for names in groups.values():
        for x in inputs.get(names[0], ()):
            seen.statistics[names[0]].add(x)


def _not_finite(block: nn.Module, inputs: Mapping[str, list[Tensor]]) -> str:
    """Name the first thing that is not finite, in the order of the calls."""
    layers = linears(block)
    for name, tensors in inputs.items():
        if not all(x.isfinite().all() for x in tensors):
            return f"the input of {name}"
        if not all(p.isfinite().all() for p in layers[name].parameters()):
            return f"a weight of {name}"
    return "the output"
