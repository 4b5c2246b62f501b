"""The meta model: modules and shapes from a config alone, on the meta device; no weight is read."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sparlow.errors import InputError, as_input_error, is_out_of_memory
from sparlow.model.forward.call_order import Dependences, counterpart, dependences_noted
from sparlow.model.forward.causality import require_decoder_only
from sparlow.model.forward.compressible import CompressibleWeight, compressible, fused_of
from sparlow.model.forward.decoder import Decoder
from sparlow.model.forward.fused_twin import show_one_expert
from sparlow.model.forward.weightless import without_weights
from sparlow.model.loading.place import GGUF, cannot_open, require_place
from sparlow.model.loading.source import parse_dtype, place_of_converted, require_no_kernel


class UnknownAheadError(InputError):
    """The plan cannot be made before the weights are opened."""


TOKENS = 8  # that pass through the meta model, to see who reads what


def meta_model(name: str, *, dtype: str = "auto", trust_remote_code: bool = False) -> PreTrainedModel:
    """Return the model without weights, in eval mode, of the type its weights are stored in.

    Args:
        name: Directory, path of a .gguf file (of which the header is read), or hub id (of which the config is fetched).
        dtype: As for ``source.open_model``; ``auto`` is what the config says, float32 where it says nothing.
        trust_remote_code: Run Python code that comes with the model.

    Raises:
        InputError: There is no such model, or the dtype does not exist.
        UnknownAheadError: The weights are packed.
    """
    config, stored = _config(name, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        raise UnknownAheadError(
            f"The weights of {name} are packed, so its config alone does not say what it holds. Give the dense model."
        )
    require_decoder_only(config, name)
    wanted = stored if dtype == "auto" else parse_dtype(dtype)
    untyped: Any = AutoModelForCausalLM
    with as_input_error(f"Cannot open the config of {name}"), torch.device("meta"):
        model: PreTrainedModel = untyped.from_config(config, dtype=wanted, trust_remote_code=trust_remote_code)
    model.eval()
    return model


def _config(name: str, *, trust_remote_code: bool) -> tuple[Any, torch.dtype]:
    place = require_place(name)
    if place is not None and place.suffix == GGUF and (converted := place_of_converted(place)).is_dir():
        place = converted  # the header holds the whole vocabulary, and takes seconds to read
    if place is not None and place.suffix == GGUF:
        with as_input_error(f"Cannot read the header of {name}"):
            return AutoConfig.from_pretrained(
                str(place.parent), gguf_file=place.name
            ), torch.float16  # see source._convert
    where = name if place is None else str(place)
    if not trust_remote_code:
        require_no_kernel(name, where)
    with as_input_error(cannot_open(name)):
        config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code)
    stored = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None) or torch.float32
    return config, getattr(torch, stored) if isinstance(stored, str) else stored


@dataclass(frozen=True)
class Inputs:
    """What the layers of a block read.

    Attributes:
        owners: For each layer by name the first that reads the same tensor, as ``collect_statistics`` will find it;
            itself where that could not be seen without weights, which is the most that statistics can take.
        dependences: From which layers each input is computed, as ``observe_dependences`` will find it; of a layer that
            could not be seen, all of those that were.
    """

    owners: dict[str, str]
    dependences: Dependences


def inputs_of(model: PreTrainedModel) -> list[Inputs]:
    """Tell for each block what its layers read, from a forward without values.

    Args:
        model: Its weights may be anywhere; it stays as it is, for its code runs in a copy without weights.
    """
    twin = without_weights(model)
    blocks = Decoder.of(twin).blocks
    for block in blocks:
        show_one_expert(block)
    seen: list[dict[str, Tensor]] = [{} for _ in blocks]
    found = [Dependences() for _ in blocks]
    ids = torch.zeros(1, TOKENS, dtype=torch.int64, device="meta")
    layers = [compressible(block) for block in blocks]
    with ExitStack() as stack, dependences_noted([*zip(blocks, layers, found, strict=True)]):
        for hook in _hooks(blocks, seen):
            stack.callback(hook.remove)
        _ = any(_runs(twin, ids, given) for given in _ways())
    # where it stopped half-way, as at experts that choose by values, the first block stands for the others
    rows = zip(layers, (inputs or seen[0] for inputs in seen), found, blocks, strict=True)
    return [
        Inputs(_owners(own, inputs, fused), _completed(own, of if of.before else found[0], fused))
        for own, inputs, of, block in rows
        for fused in ({name: len(weight) for name, weight in fused_of(block).items()},)
    ]


def _completed(layers: Mapping[str, CompressibleWeight], found: Dependences, fused: Mapping[str, int]) -> Dependences:
    found.like_others(fused)
    unseen = layers.keys() - found.before.keys()
    return Dependences({**found.before, **{name: set(found.before) for name in unseen}}, found.repeated)


def _ways() -> Iterator[dict[str, Tensor]]:
    """Yield arguments, beside the tokens, with which a model may run, the most likely first.

    Most models look into a mask of their own making, and some into positions, neither of which has values here; what
    they are given instead they take as it is. Not all take a mask of this form, and which do changes between releases.
    """
    ready = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool, device="meta")
    yield {"attention_mask": ready}
    yield {"attention_mask": ready, "position_ids": torch.ones(1, TOKENS, dtype=torch.int64, device="meta")}
    yield {"attention_mask": torch.ones(1, TOKENS, dtype=torch.int64, device="meta")}
    yield {}


def _hooks(blocks: nn.ModuleList, seen: list[dict[str, Tensor]]) -> Iterator[Any]:
    def noting(inputs: dict[str, Tensor], name: str) -> Any:  # noqa: ANN401 - a hook
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs[name] = (*args, *kwargs.values())[0]

        return note

    for block, inputs in zip(blocks, seen, strict=True):
        for name, weight in compressible(block).items():
            yield block.get_submodule(weight.reads).register_forward_pre_hook(noting(inputs, name), with_kwargs=True)


@torch.no_grad()
def _runs(model: PreTrainedModel, ids: Tensor, options: Mapping[str, Tensor]) -> bool:
    try:
        model(ids, use_cache=False, **options)
    except Exception as error:  # foreign code that looks at values may fail in any way without them
        if is_out_of_memory(error):
            raise
        return False
    return True


def _owners(
    layers: Mapping[str, CompressibleWeight], inputs: Mapping[str, Tensor], fused: Mapping[str, int]
) -> dict[str, str]:
    first: dict[int, str] = {}
    read = {name: first.setdefault(id(x), name) for name, x in inputs.items() if name in layers}
    for role, count in fused.items():  # what one expert showed is true of all
        owner = read.get(f"{role}.0")
        if owner and owner.rpartition(".")[0] in fused:
            read |= {f"{role}.{number}": counterpart(owner, 0, number, fused) for number in range(count)}
    return {name: read.get(name, name) for name in layers}
