"""Run a dense block once for both its outputs and the statistics of what its linear layers read."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from sparlow.distributed import ALONE, Processes
from sparlow.errors import InputError
from sparlow.finite import all_finite
from sparlow.model.forward.activation_store import ActivationStore
from sparlow.model.forward.decoder import Call, linears, run_block


class Statistic(Protocol):
    """Anything that accumulates inputs of a linear layer."""

    def add(self, x: Tensor, /) -> None:
        """Take in one input of shape (..., in)."""


Kind = TypeVar("Kind", bound=Statistic)


@dataclass(frozen=True)
class Observation(Generic[Kind]):
    """What the linears of a block read in one pass.

    Attributes:
        statistics: one for each distinct input, under the name of the first linear that reads it.
        owner: for each linear the name its statistic has; a linear that is never called has none.
        windows: how many passed, here.
    """

    statistics: dict[str, Kind]
    owner: dict[str, str]
    windows: int = 0


class _AllSeen(Exception):  # noqa: N818 - no error, but the only way out of a foreign forward
    """Every linear has been called: what the block computes from here on is not wanted."""


@torch.no_grad()
def collect_statistics(
    block: nn.Module,
    calls: Mapping[int, Call],
    hidden: Iterable[Tensor],
    new_statistic: Callable[[int, torch.device], Kind],
    *,
    outputs: ActivationStore | None = None,
    label: str = "block",
    processes: Processes = ALONE,
) -> Observation[Kind]:
    """Run a block once over all micro-batches for both its outputs and the statistics of its linears' inputs.

    Linears that read the very same tensors (query, key and value; gate and up) share one statistic. If the outputs are
    not wanted, and the first micro-batch called every linear once, the others end where the last linear would begin.

    Args:
        calls: the block's calls by number of windows, from ``capture_block_inputs``.
        hidden: the block's inputs, (b, seqlen, d) each.
        new_statistic: makes an empty statistic of inputs (..., in) from ``in`` and their device.
        outputs: takes the outputs; they are not kept if left out.
        label: how errors call the block.
        processes: those that each see a part of the text; afterwards all have the same statistics, each with its part.

    Raises:
        InputError: an output is not finite; the message names the first layer concerned.
    """
    device = next(block.parameters()).device
    calls = {size: call.to(device) for size, call in calls.items()}
    seen: Observation[Kind] = Observation({}, {})
    layers, windows, enough = linears(block), 0, False
    for x in hidden:
        if not len(x):
            if outputs is not None:
                outputs.append(x)
            continue
        windows += len(x)
        y: Tensor | None = None
        with _inputs_noted(layers, label, enough=enough) as inputs, suppress(_AllSeen):
            y = run_block(block, x, calls[len(x)])
        if not all(all_finite(z) for z in (_distinct(inputs) if y is None else (y,))):
            raise InputError(
                f"{label}: {_not_finite(block, inputs)} is not finite (NaN or inf); "
                "use --dtype float32 or check the model's weights"
            )
        if outputs is None:
            enough = enough or (inputs.keys() == layers.keys() and all(len(called) == 1 for called in inputs.values()))
        elif y is not None:
            outputs.append(y)
        _add(seen, inputs, new_statistic)
    if processes.size > 1:
        seen = _agreed(block, seen, new_statistic, device, processes)
    return replace(seen, windows=windows)


@contextmanager
def _inputs_noted(layers: Mapping[str, nn.Linear], label: str, *, enough: bool) -> Iterator[dict[str, list[Tensor]]]:
    """Collect what each linear reads, in the order of the calls; kept alive, so that identities stay distinct.

    If that is ``enough``, the forward is left by ``_AllSeen`` when every linear has been called.
    """
    inputs: dict[str, list[Tensor]] = {}
    versions: list[tuple[str, Tensor, int]] = []

    def hook(name: str) -> Callable[..., None]:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            inputs.setdefault(name, []).append(x)
            versions.append((name, x, x._version))  # noqa: SLF001 - how torch counts changes in place
            if enough and len(inputs) == len(layers):
                raise _AllSeen

        return note

    with ExitStack() as stack:
        for name, linear in layers.items():
            stack.enter_context(linear.register_forward_pre_hook(hook(name), with_kwargs=True))
        yield inputs
    for name, x, version in versions:  # statistics are taken now, after the forward
        if x._version != version:  # noqa: SLF001 - see above
            raise InputError(f"{label} changes the input of {name} in place, so it cannot be observed")


def _distinct(inputs: Mapping[str, list[Tensor]]) -> Iterable[Tensor]:
    """Each tensor once, however many linears read it."""
    return {id(x): x for called in inputs.values() for x in called}.values()


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


def _agreed(
    block: nn.Module,
    seen: Observation[Kind],
    new_statistic: Callable[[int, torch.device], Kind],
    device: torch.device,
    processes: Processes,
) -> Observation[Kind]:
    """Share statistics only between linears that share them in every process; what nobody reads here gets an empty one.

    An expert, for one, may see tokens in some processes only.
    """
    owners = processes.all_gather(seen.owner)
    groups: dict[tuple[str | None, ...], list[str]] = {}
    for name in linears(block):
        key = tuple(owner.get(name) for owner in owners)
        if any(key):
            groups.setdefault(key, []).append(name)
    layers, found = linears(block), Observation[Kind]({}, {})
    for key, names in groups.items():
        before = key[processes.rank]
        if before is None:
            statistic = new_statistic(layers[names[0]].in_features, device)
        else:
            statistic = seen.statistics[before] if names[0] == before else copy.deepcopy(seen.statistics[before])
        found.statistics[names[0]] = statistic
        found.owner.update(dict.fromkeys(names, names[0]))
    return found


def _not_finite(block: nn.Module, inputs: Mapping[str, list[Tensor]]) -> str:
    """Name the first thing that is not finite, in the order of the calls."""
    layers = linears(block)
    for name, tensors in inputs.items():
        if not all(all_finite(x) for x in tensors):
            return f"the input of {name}"
        if not all(all_finite(p) for p in layers[name].parameters()):
            return f"a weight of {name}"
    return "the output"
