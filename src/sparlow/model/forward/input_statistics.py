"""Run a block once, for both its outputs and the statistics of the inputs of its weights."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from sparlow.errors import InputError, RunError
from sparlow.finite import all_finite
from sparlow.model.forward.activation_store import ActivationStore
from sparlow.model.forward.block_pass import BlockPass, run_block
from sparlow.model.forward.compressible import CompressibleWeight, called


class Statistic(Protocol):
    """Anything that accumulates inputs of a weight."""

    def add(self, x: Tensor, /) -> None:
        """Take in one input of shape (..., in)."""


Kind = TypeVar("Kind", bound=Statistic)


@dataclass(frozen=True)
class Observation(Generic[Kind]):
    """Statistics of the inputs of a block's weights, from one pass.

    Attributes:
        statistics: One for each distinct input, under the name of the first weight that reads it.
        owner: For each weight the key of its statistic. A weight has none if its layer is never called as a module,
            even if other code reads it.
        windows: How many windows this process ran.
    """

    statistics: dict[str, Kind]
    owner: dict[str, str]
    windows: int = 0


@dataclass(frozen=True)
class Stage:
    """Layers of a block whose inputs are observed in one pass.

    Attributes:
        names: Of the layers.
        called_once: No forward calls one of them twice, and so nothing is left to see once all have been called.
        behind_others: Layers in front of them have been compressed.
        pools: Modules whose input is observed too: all tokens of which each expert is given some.
    """

    names: tuple[str, ...]
    called_once: bool = False
    behind_others: bool = False
    pools: tuple["Pool", ...] = ()


@dataclass(frozen=True)
class Pool:
    """All tokens that enter a module that calls experts, observed as the input of a layer is.

    Attributes:
        reads: The name of the module in the block.
        features: Of its input.
    """

    reads: str
    features: int

    @property
    def name(self) -> str:
        """What its statistic is called."""
        return f"{self.reads} (all tokens)"

    @property
    def shape(self) -> tuple[int, int]:
        """As of a layer without outputs."""
        return 0, self.features

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of the layer: none."""
        return iter(())


_Observed = CompressibleWeight | Pool


class _AllSeen(Exception):  # noqa: N818 - no error, but the only way out of a foreign forward
    """Every layer has been called, so the rest of the block's forward is not needed."""


@torch.no_grad()
def collect_statistics(
    through: BlockPass,
    new_statistic: Callable[[int, torch.device], Kind],
    outputs: ActivationStore | None = None,
    stage: Stage | None = None,
) -> Observation[Kind]:
    """Run a block once on all micro-batches, for both its outputs and the statistics of the inputs of its weights.

    Weights that read the same tensors (query, key and value; gate and up) share one statistic. If the outputs are not
    wanted, and the stage says that every layer is called once, or the first micro-batch did so, forwards stop in front
    of the last layer.

    Args:
        through: The block and its inputs. With several processes, all end with the same set of statistics, each of
            them summed over its own windows only.
        new_statistic: Makes an empty statistic from the width ``in`` of inputs (..., in) and their device.
        outputs: Where to put the outputs. If left out, they are not kept.
        stage: Says which layers are observed; if left out, all but experts in parameters that were not taken apart.

    Raises:
        InputError: An output is not finite; the message names the first layer concerned.
        RunError: An input is not finite behind layers that have been compressed.
    """
    seen: Observation[Kind] = Observation({}, {})
    stage = stage or Stage(tuple(called(through.weights)))
    names = set(stage.names)
    weights: dict[str, _Observed] = {name: weight for name, weight in through.weights.items() if name in names}
    weights |= {pool.name: pool for pool in stage.pools}
    windows, enough = 0, stage.called_once and outputs is None
    for i, x in enumerate(through.hidden):
        if not len(x):
            if outputs is not None:
                outputs.append(x)
            continue
        windows += len(x)
        y: Tensor | None = None
        call = through.call(i)
        with _inputs_noted(through, weights, enough=enough) as inputs, suppress(_AllSeen):
            y = run_block(through.block, x, call)
        if not all(all_finite(z) for z in (_distinct(inputs) if y is None else (y,))):
            raise _not_finite(through.label, weights, inputs, stage)
        if outputs is None:
            enough = enough or (inputs.keys() == weights.keys() and all(len(called) == 1 for called in inputs.values()))
        elif y is not None:
            outputs.append(y, call.written())
        _add(seen, inputs, new_statistic)
    if through.processes.size > 1:
        seen = _agreed(weights, seen, new_statistic, through)
    return replace(seen, windows=windows)


@contextmanager
def _inputs_noted(
    through: BlockPass, weights: Mapping[str, _Observed], *, enough: bool
) -> Iterator[dict[str, list[Tensor]]]:
    """Collect the inputs of each weight, in the order of the calls. They are kept alive, so that ids stay distinct.

    If the inputs are ``enough``, ``_AllSeen`` leaves the forward once every layer has been called.
    """
    inputs: dict[str, list[Tensor]] = {}
    versions: list[tuple[str, Tensor, int]] = []

    def hook(name: str) -> Callable[..., None]:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = (*args, *kwargs.values())[0]
            inputs.setdefault(name, []).append(x)
            versions.append((name, x, x._version))  # noqa: SLF001 - how torch counts changes in place
            if enough and len(inputs) == len(weights):
                raise _AllSeen

        return note

    with ExitStack() as stack:
        for name, weight in weights.items():
            module = through.block.get_submodule(weight.reads)
            stack.enter_context(module.register_forward_pre_hook(hook(name), with_kwargs=True))
        yield inputs
    for name, x, version in versions:  # statistics are taken now, after the forward
        if x._version != version:  # noqa: SLF001 - see above
            raise InputError(f"{through.label} changes the input of {name} in place, so it cannot be observed.")


def _distinct(inputs: Mapping[str, list[Tensor]]) -> Iterable[Tensor]:
    """Each tensor once, however many weights read it."""
    return {id(x): x for called in inputs.values() for x in called}.values()


def _add(
    seen: Observation[Kind], inputs: Mapping[str, list[Tensor]], new_statistic: Callable[[int, torch.device], Kind]
) -> None:
    """Add the inputs of one forward. A weight that stops sharing the inputs of another continues on a copy."""
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
    weights: Mapping[str, _Observed],
    seen: Observation[Kind],
    new_statistic: Callable[[int, torch.device], Kind],
    through: BlockPass,
) -> Observation[Kind]:
    """Make all processes share statistics between the same weights; a weight that saw no input here gets an empty one.

    An expert, for example, may see tokens in some processes only.
    """
    owners = through.processes.all_gather(seen.owner)
    groups: dict[tuple[str | None, ...], list[str]] = {}
    for name in weights:
        key = tuple(owner.get(name) for owner in owners)
        if any(key):
            groups.setdefault(key, []).append(name)
    found = Observation[Kind]({}, {})
    for key, names in groups.items():
        before = key[through.processes.rank]
        if before is None:
            statistic = new_statistic(weights[names[0]].shape[1], through.device)
        else:
            statistic = seen.statistics[before] if names[0] == before else copy.deepcopy(seen.statistics[before])
        found.statistics[names[0]] = statistic
        found.owner.update(dict.fromkeys(names, names[0]))
    return found


def _not_finite(
    label: str, weights: Mapping[str, _Observed], inputs: Mapping[str, list[Tensor]], stage: Stage
) -> InputError | RunError:
    """Return the error that names the first thing that is not finite, in the order of the calls."""
    what = next(_wrong(weights, inputs), "the output")
    if stage.behind_others:
        return RunError(
            f"{label}: {what} is not finite behind the block's layers that are compressed already. Raise --damping, or "
            "use --dtype float32."
        )
    return InputError(f"{label}: {what} is not finite (NaN or inf). Use --dtype float32, or check the model's weights.")


def _wrong(weights: Mapping[str, _Observed], inputs: Mapping[str, list[Tensor]]) -> Iterator[str]:
    for name, tensors in inputs.items():
        if not all(all_finite(x) for x in tensors):
            yield f"the input of {name}"
        if not all(all_finite(p) for p in weights[name].parameters()):
            yield f"a weight of {name}"
