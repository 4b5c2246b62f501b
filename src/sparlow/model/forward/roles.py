"""Linear layers that stay dense because of what they do, told by structure and never by a name.

A router's small errors send tokens to other experts, a gate of a few outputs saves nothing, and a layer whose weight
other code reads, instead of calling it, never shows what it is multiplied by.
"""

import itertools
import json
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparlow.errors import is_out_of_memory
from sparlow.model.forward.calls import Given
from sparlow.model.forward.compressible import ExpertWeight, called, compressible, weight_of
from sparlow.model.forward.decoder import Decoder
from sparlow.model.forward.stand_ins import run_with_stand_ins
from sparlow.model.forward.weightless import TensorWatch, without_weights

TOKENS = 8  # of each of two windows that pass around the blocks where there are no weights

FEW = 8  # outputs; a layer with fewer gates or chooses, and holds next to nothing
READ = "linear layer whose weight other code reads without calling it"


def kept_dense(model: PreTrainedModel, decoder: Decoder) -> dict[str, str]:
    """Return the layers of all blocks that stay dense unless a recipe names them, with the reason, by full name.

    Args:
        model: Its weights may be anywhere; they are not looked at.
        decoder: Its blocks.
    """
    found: dict[str, str] = {}
    read = _known_read(model)
    for i, block in enumerate(decoder.blocks):
        experts = set(_experts(block))
        for name, weight in decoder.weights(i).items():
            outputs, features = weight.shape
            if outputs < FEW:
                found[decoder.layer_name(i, name)] = f"linear layer with fewer than {FEW} outputs ({outputs})"
            elif isinstance(weight, ExpertWeight):
                continue  # it is called, see fused_layout
            elif {(outputs, features), (outputs, None)} & experts:
                found[decoder.layer_name(i, name)] = f"linear layer with an output for each of {outputs} experts"
            elif name in read:
                found[decoder.layer_name(i, name)] = READ
    return found


def _experts(block: nn.Module) -> Iterator[tuple[int, int | None]]:
    """Yield how many experts are held together somewhere in a block, and how many features their inputs may have.

    They are the slices of a parameter with three dimensions, the rows of one matrix that has the product of two numbers
    of them which its module knows, or a list of modules that are alike.
    """
    for module in block.modules():
        if isinstance(module, nn.ModuleList):
            kinds = {type(part) for part in module}
            if len(kinds) == 1 and any(p.ndim > 1 for p in module[0].parameters()):
                yield len(module), None
            continue
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            continue
        own = dict(module.named_parameters(recurse=False))
        numbers = {value for value in vars(module).values() if type(value) is int and value > 1}
        fused = weight_of(module, "", module) is None
        for p in own.values():
            if p.ndim == 3 and min(p.shape[1:]) > 1:  # noqa: PLR2004 - (experts, …, …)
                yield from ((p.shape[0], features) for features in p.shape[1:])
            if p.ndim == 2 and fused:  # noqa: PLR2004 - (experts · …, …)
                for number in numbers:
                    count, rest = divmod(p.shape[0], number)
                    if not rest and count in numbers and count < number:
                        yield count, p.shape[1]


_KNOWN: dict[Hashable, frozenset[str]] = {}  # of models seen in this process: a command looks at one several times
MOST_KNOWN = 64


def _known_read(model: PreTrainedModel) -> frozenset[str]:
    """Return what ``_read_elsewhere`` finds, from before if a model with the same code and sizes was looked at."""
    key = _code_and_sizes(model)
    if key is None:
        return frozenset(_read_elsewhere(model))
    if key not in _KNOWN:
        if len(_KNOWN) >= MOST_KNOWN:
            _KNOWN.clear()
        _KNOWN[key] = frozenset(_read_elsewhere(model))
    return _KNOWN[key]


def _code_and_sizes(model: PreTrainedModel) -> Hashable | None:
    """Return all that decides on what a model computes but its weights; None where a module has code of its own."""
    code = []
    for name, module in model.named_modules():
        if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:  # noqa: SLF001 - torch has no other way to ask
            return None
        code.append((name, type(module), type(module).forward))
    sizes = tuple((name, p.shape, p.dtype) for name, p in model.named_parameters())
    ways = tuple(getattr(model.config, f"_{part}_implementation", None) for part in ("attn", "experts"))
    config = json.dumps(model.config.to_dict(), sort_keys=True, default=str)
    return type(model), config, ways, tuple(code), sizes


def _read_elsewhere(model: PreTrainedModel) -> set[str]:
    """Return the names, within their blocks, of layers whose weight something but their own forward computes with.

    Every block runs once without values. What stops half-way, as experts that are chosen by values do, has shown what
    came before.
    """
    twin = without_weights(model)
    decoder = Decoder.of(twin)
    forwards = [block.forward for block in decoder.blocks]
    mask = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool, device="meta")  # most models look into one of their own
    watch = _Watch()
    with ExitStack() as stack:
        stack.enter_context(watch)
        for block in decoder.blocks:
            for name, weight in called(compressible(block)).items():
                for hook in watch.hooks(name, block.get_submodule(weight.reads), list(weight.parameters())):
                    stack.callback(hook.remove)
        ways = itertools.product((_itself, _in_tuple), ({"attention_mask": mask}, {}))
        _ = any(_runs_whole(twin, decoder, forwards, wrapped, options) for wrapped, options in ways)
    return watch.found


def _itself(x: Tensor) -> Any:  # noqa: ANN401 - what a foreign forward returns
    return x


def _in_tuple(x: Tensor) -> Any:  # noqa: ANN401 - what a foreign forward returns
    return (x,)


@torch.no_grad()
def _runs_whole(
    model: PreTrainedModel,
    decoder: Decoder,
    forwards: Sequence[Callable[..., Any]],
    wrapped: Callable[[Tensor], Any],
    options: Mapping[str, Tensor],
) -> bool:
    """Run a model without weights; whether it and all its blocks came to their end.

    Args:
        model: On the meta device.
        decoder: Its blocks.
        forwards: Theirs.
        wrapped: What a block returns in place of what it could not compute, from its hidden state.
        options: Of the model's forward.
    """
    whole = True

    def answer(i: int, x: Tensor, given: Given) -> Any:  # noqa: ANN401 - what a foreign forward returns
        nonlocal whole
        try:
            return forwards[i](x, *given[0], **given[1])
        except Exception as error:  # foreign code that looks at values may fail in any way without them
            if is_out_of_memory(error):
                raise
            whole = False
            return wrapped(x)

    ids = torch.zeros(2, TOKENS, dtype=torch.int64, device="meta")
    try:
        run_with_stand_ins(model, decoder, ids, answer, options)
    except Exception as error:  # the same
        if is_out_of_memory(error):
            raise
        return False
    return whole


class _Watch(TensorWatch):
    """Sees which parameters are computed with while the layers they belong to are not running."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self._names: dict[int, str] = {}  # by id of the parameter, which its module holds
        self._running: list[str] = []

    def hooks(self, name: str, module: nn.Module, own: list[nn.Parameter]) -> Iterator[Any]:
        """Watch over one layer; what is returned is to be removed in the end."""
        self._names |= {id(p): name for p in own}
        yield module.register_forward_pre_hook(lambda *_: self._running.append(name))
        yield module.register_forward_hook(lambda *_: self._ended(), always_call=True)

    def _ended(self) -> None:
        self._running.pop()

    def saw(self, given: Iterator[Tensor], result: Any) -> None:  # noqa: ANN401 - whatever a function returns
        """See ``TensorWatch``."""
        if isinstance(result, Tensor):  # a look at its type or size is no reading
            names = {self._names.get(id(tensor)) for tensor in given}
            self.found |= {name for name in names if name and name not in self._running}
