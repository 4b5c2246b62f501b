"""Whether a model was opened in a narrower type than its files hold."""

import math
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from transformers import PreTrainedModel

from sparlow.model.loading.streaming import CannotStreamError, stored_tensors

WIDE = {"F64": 8, "F32": 4}  # bytes of a number, by safetensors' name of its type


def narrowed(model: PreTrainedModel, where: str, revision: str | None) -> tuple[str, ...]:
    """Warn if numbers are stored as float32 and were opened in half precision because the config says so.

    Args:
        model: As opened in the type that its config gives; it may be on the meta device.
        where: Directory or hub id.
        revision: Of the hub's repository.
    """
    try:
        files = stored_tensors(where, revision)
    except CannotStreamError:  # weights under other names, about which nothing is known here
        return ()
    opened = {name: tensor.dtype.itemsize for name, tensor in model.state_dict().items()}
    lost = whole = 0
    for name, (size, numbers) in _stored(files).items():
        whole += numbers
        if size > opened.get(name, model.dtype.itemsize):  # a name that is unknown was changed on opening
            lost += numbers
    if not lost:
        return ()
    share = "the weights are" if lost == whole else f"{lost:,} of {whole:,} numbers are"
    dtype = str(model.dtype).removeprefix("torch.")
    why = f"were opened (and so rounded) as {dtype}, because config.json says so: --dtype float32 keeps them"
    return (f"{share} stored as float32, but {why}",)


def _stored(files: Mapping[str, Path]) -> dict[str, tuple[int, int]]:
    """Bytes of a number (0 for less than float32) and count of each tensor, from the headers alone."""
    found = {}
    for path in dict.fromkeys(files.values()):
        with safe_open(path, framework="pt") as file:
            for name in (name for name, where in files.items() if where == path):
                tensor = file.get_slice(name)
                found[name] = WIDE.get(tensor.get_dtype(), 0), math.prod(tensor.get_shape())
    return found
