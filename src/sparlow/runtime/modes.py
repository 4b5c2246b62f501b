"""Opening a model: packed to run it, merged for other code, or dense to train it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparlow.errors import InputError
from sparlow.model.artefact.opening import use
from sparlow.runtime.opening import MODE, opening_of
from sparlow.runtime.options import activations_of
from sparlow.schema import unknown

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STEPS = ("transformers", "kernel")


def load(
    folder: str | Path,
    *,
    mode: str | None = None,
    activations: str | None = None,
    step: str = "transformers",
    **options: Any,  # noqa: ANN401 - those of from_pretrained
) -> "PreTrainedModel":
    """Open a compressed model; as ``AutoModelForCausalLM.from_pretrained``, but strict.

    Args:
        folder: A directory, or the id of a model on the hub.
        mode: ``dense``: S expanded beside U and V, to be trained. ``packed``: every compressed layer as it is stored,
            mapped from the file, multiplied by a kernel on the CPU. ``merged``: one dense weight S + U V a layer.
            ``auto``: packed where this machine has a kernel for it, else merged. If left out, what the variable
            ``SPARLOW_MODE`` says, else dense.
        activations: Of packed layers: ``float``, or ``int8``, which rounds their inputs where the stored levels are
            integers. If left out, what ``SPARLOW_ACTIVATIONS`` says, else int8 in mode auto and float in others.
        step: What computes a token behind others: ``transformers``; or ``kernel``, one call for all blocks, where the
            model's structure is one that the kernel knows, which the first ``generate`` finds out and says if not. It
            moves the weights to large pages of memory where the system has them.
        options: Of ``from_pretrained``, such as dtype and device_map.

    Raises:
        InputError: It is no model that sparlow wrote, it is unfinished, damaged or from a newer sparlow, or there is no
            such mode or step.
    """
    from sparlow.model.artefact import checkpoint

    chosen = _chosen(mode, activations)
    opening_of(*chosen)  # a wrong name is told before anything is read
    if step not in STEPS:
        raise InputError(unknown(f"There is no step {step!r}", step, STEPS))
    model = checkpoint.load(folder, lambda: opening_of(*chosen), **options)
    if step == "kernel":
        from sparlow.runtime.stepping import use_step

        use_step(model)
    return model


@contextmanager
def mode(name: str, *, activations: str | None = None) -> Iterator[None]:
    """Within this context, ``from_pretrained`` opens compressed models in a mode, see ``load``.

    Raises:
        InputError: There is no such mode.
    """
    chosen = _chosen(name, activations)
    opening_of(*chosen)
    with use(lambda: opening_of(*chosen)):
        yield


def _chosen(mode: str | None, activations: str | None) -> tuple[str, str]:
    taken = mode or os.environ.get(MODE) or "dense"
    return taken, activations or activations_of(taken)
