"""Lets a model decode by the kernel's step: ``generate`` and all that it can do stay transformers'."""

import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from sparlow.runtime.anatomy import UnlikeError
from sparlow.runtime.cache import StepCache
from sparlow.runtime.greedy import Greedy, greedy, write
from sparlow.runtime.placement import use_large_pages
from sparlow.runtime.step import Step

_log = logging.getLogger("sparlow")
_REPLACED = ("forward", "generate")
CACHES = ("cache", "past_key_values")  # names of the argument, that of transformers from 5.24 on first
_HARMLESS = ("use_cache", "return_dict", "logits_to_keep", "num_logits_to_keep", "cache_position")  # of one token


class Stepping:
    """What a model's ``forward`` and ``generate`` do once it decodes by the kernel's step.

    A pass over one token of up to eight texts, all of whose tokens count, behind a cache of ``generate``, is a step.
    Everything else is the model's own pass.

    Attributes:
        model: It.
        why_not: Why there is no step, once that has been seen.
        steps: How many there were.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.why_not, self.steps = model, "", 0
        self._step: Step | None = None
        self._moved = False  # whether the weights were moved to where they are read quickest

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_step": None, "_moved": False}  # addresses and memory of this process

    def ready(self) -> Step | None:
        """Return the step for the model as it is now; None if there is none, which is said once."""
        if self._step is not None and self._step.is_current(self.model):
            return self._step
        self._step = None
        if self.model.training:
            return None
        before = self.why_not
        if not self._moved:
            use_large_pages(self.model)
            self._moved = True
        with unused(self.model):
            try:
                self._step, self.why_not = Step(self.model), ""
            except UnlikeError as problem:
                self.why_not = str(problem)
        if self.why_not and self.why_not != before:
            _log.warning("Each token is computed by transformers, not in one call of the kernel: %s.", self.why_not)
        return self._step

    def written(self, step: Step, wanted: Greedy) -> Tensor:
        """Return what ``generate`` does, by the step alone."""
        found = write(self.model, step, wanted)
        self.steps += max(found.shape[1] - wanted.ids.shape[1] - 1, 0)
        return found

    def forward(self, arguments: Mapping[str, Any]) -> Any:  # noqa: ANN401 - what a model's forward returns
        """Return the logits of a step in the form that a model gives them, or None if this is no step."""
        ids, step = arguments.get("input_ids"), self._step
        cache = next((arguments[name] for name in CACHES if arguments.get(name) is not None), None)
        if step is None or not isinstance(cache, StepCache) or not isinstance(ids, Tensor) or self.model.training:
            return None
        at = cache.length
        if ids.shape[1] != 1 or not step.takes(len(ids), at) or not _plain(arguments, at):
            return None
        if torch.is_grad_enabled() or cache.texts != len(ids):
            return None
        self.steps += 1
        logits = step(ids, cache)[:, None].to(self.model.dtype)
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)


def _plain(arguments: Mapping[str, Any], at: int) -> bool:
    """Whether nothing is asked for but the logits, and every token before counts and has its own place."""
    for name, value in arguments.items():
        if name in ("input_ids", *CACHES, *_HARMLESS) or value is None or value is False:
            continue
        if name == "attention_mask" and isinstance(value, Tensor):
            if value.ndim != 2 or value.shape[1] != at + 1 or not bool(value.all()):  # noqa: PLR2004 - texts, tokens
                return False
        elif name == "position_ids" and isinstance(value, Tensor):
            if not bool((value == at).all()):
                return False
        else:
            return False
    return True


class _Forward:
    """In the place of a model's ``forward``."""

    def __init__(self, stepping: Stepping) -> None:
        self.stepping = stepping

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the model's own, which transformers looks at."""
        return inspect.signature(type(self.stepping.model).forward.__get__(self.stepping.model))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the model's
        found = self.stepping.forward(kwargs) if not args else None
        return type(self.stepping.model).forward(self.stepping.model, *args, **kwargs) if found is None else found


class _Generate:
    """In the place of a model's ``generate``."""

    def __init__(self, stepping: Stepping) -> None:
        self.stepping = stepping

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - transformers'
        untyped: Any = self.stepping.model
        if _takes_any_cache(untyped, kwargs):
            step = self.stepping.ready()
            if step is not None:
                wanted = greedy(untyped, args, kwargs)
                if wanted is not None and step.takes(len(wanted.ids), wanted.ids.shape[1] + wanted.most):
                    with unused(untyped):
                        return self.stepping.written(step, wanted)
                kwargs[_name_of_cache(untyped)] = step.cache()
        return type(untyped).generate(untyped, *args, **kwargs)


def _name_of_cache(model: PreTrainedModel) -> str:
    """Return what the argument is called to which a cache is given: that depends on the release of transformers."""
    known = inspect.signature(type(model).forward).parameters
    return CACHES[0] if CACHES[0] in known else CACHES[1]


def _takes_any_cache(model: Any, asked: Mapping[str, Any]) -> bool:  # noqa: ANN401 - a model of transformers
    """Whether nobody has said which cache ``generate`` is to use."""
    if any(asked.get(name) is not None for name in (*CACHES, "assistant_model")):
        return False
    for given in (asked, vars(asked.get("generation_config") or model.generation_config)):
        if given.get("cache_implementation") is not None or given.get("use_cache") is False:
            return False
    return True


def use_step(model: PreTrainedModel, stepping: Stepping | None = None) -> Stepping:
    """Let a model decode by the kernel's step where it can, from now on; whether it can is seen at the first use.

    Args:
        model: It.
        stepping: What an earlier call returned, to go on with that.
    """
    stepping = stepping or Stepping(model)
    vars(model)["forward"], vars(model)["generate"] = _Forward(stepping), _Generate(stepping)
    return stepping


def leave_step(model: PreTrainedModel) -> None:
    """Undo ``use_step``."""
    for name in _REPLACED:
        vars(model).pop(name, None)


@contextmanager
def unused(model: PreTrainedModel) -> Iterator[None]:
    """Within this context, a model computes by itself."""
    kept: dict[str, Any] = {name: vars(model).pop(name) for name in _REPLACED if name in vars(model)}
    try:
        yield
    finally:
        vars(model).update(kept)
