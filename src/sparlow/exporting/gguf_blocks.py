"""Numbers in GGUF's blocks of 32 columns: exactly where S's own grid fits into them, else rounded by gguf itself.

Q8_0 is a float16 scale and 32 codes of 8 bits, Q4_0 a float16 scale and 32 codes of 4 bits, shifted by 8; the first 16
are the low halves of 16 bytes. A scale for 64 or 128 columns is repeated.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparlow.errors import InputError
from sparlow.exporting.integers import Integers, Need, exact_integers
from sparlow.exporting.stored import Layer

BLOCK = 32
BITS = {"q8_0": 8, "q4_0": 4}


def type_of(shape: tuple[int, ...], wanted: str) -> str:
    """Return the type of a tensor: vectors in f32, matrices as wanted if their rows consist of blocks, else f16."""
    if len(shape) == 1:
        return "f32"
    return wanted if wanted not in BITS or shape[-1] % BLOCK == 0 else "f16"


def byte_shape(shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
    """Return the shape of a tensor of blocks in bytes."""
    return (*shape[:-1], shape[-1] // BLOCK * (2 + BLOCK * BITS[kind] // 8))


def is_exact(layer: Layer, kind: str) -> bool:
    """Whether S lies on a grid that blocks of this type hold exactly."""
    values = layer.form.values if layer.form else None
    need = Need.of(values.grid if values else None).bits
    if values is None or need is None or need > BITS[kind] or (values.grid.group or layer.S.shape[1]) % BLOCK:
        return False
    scale = exact_integers(layer).scale
    return torch.equal(scale.half().float(), scale)


def exact_blocks(layer: Layer, kind: str) -> Any:  # noqa: ANN401 - a numpy array
    """Return S (out, in) in blocks; see ``is_exact``."""
    codes, scale, group = exact_integers(layer)
    return _blocks(Integers(codes, scale, group), kind)


def _blocks(found: Integers, kind: str) -> Any:  # noqa: ANN401 - a numpy array
    out, columns = found.codes.shape
    each = found.scale.repeat_interleave(found.group, 1)[:, ::BLOCK].half()  # (out, blocks)
    codes = found.codes.view(out, columns // BLOCK, BLOCK)
    if kind == "q4_0":
        shifted = (codes + 8).to(torch.uint8)
        codes = shifted[..., : BLOCK // 2] | (shifted[..., BLOCK // 2 :] << 4)
    heads = torch.from_numpy(each.contiguous().numpy().view(np.uint8)).view(out, columns // BLOCK, 2)
    return torch.cat([heads, codes.view(torch.uint8)], dim=2).view(out, -1).contiguous().numpy()


def converted(tensor: Tensor, kind: str, name: str) -> Any:  # noqa: ANN401 - a numpy array
    """Return a tensor in a type, rounded to nearest.

    Raises:
        InputError: It leaves the range of float16.
    """
    whole = tensor.float().contiguous()
    if kind == "f32":
        return whole.numpy()
    if kind == "f16":
        if not bool(whole.half().isfinite().all()):
            raise InputError(f"{name} leaves the range of float16. Choose --option type=q8_0, or export merged.")
        return whole.half().numpy()
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import quantize

    return quantize(whole.numpy(), GGMLQuantizationType[kind.upper()])
