"""Directories in packed forms without a solver, for measuring how fast they run: what they say is of no worth.

    python benchmarks/packed.py MODEL_OR_SHAPE --out DIR [--forms bf16:16:32,int8:16:32,int4:dense] [--rank 64]
        [--levels integer] [--ends int8] [--blocks 16] [--dtype bfloat16] [--copies]

A form is a type of values, then a pattern. The largest entries of each group stay and are rounded to nearest, U and V
are random and small, in int8 where the values are. A shape is one of ``_shapes.py``, whose random dense model goes to
DIR/dense first. With --copies every block is the first one, which is quicker to write. DIR then holds a directory a
form, such as int8-16-32, which ``sparlow benchmark`` takes.
"""

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from _shapes import SHAPES, write

from sparlow.linalg.grid import FactorScales, GridValues, make_grid
from sparlow.linalg.nearest import grid_of_largest
from sparlow.linalg.patterns import parse_pattern
from sparlow.model.artefact.checkpoint import CheckpointWriter
from sparlow.model.artefact.embedding import quantised
from sparlow.model.artefact.layers import SparseLowRankLinear
from sparlow.model.artefact.stored_form import StoredForm
from sparlow.model.forward.compressible import CompressibleWeight
from sparlow.model.forward.decoder import Decoder
from sparlow.model.loading.source import open_model


def packed(weight: CompressibleWeight, values: str, pattern: str, rank: int, levels: str) -> SparseLowRankLinear:
    """Return a layer in a form, its weight on the grid that holds its largest entries."""
    W, dtype = weight.read().float(), weight.dtype
    mask = None if pattern == "dense" else parse_pattern("0.5" if pattern == "free" else pattern).mask(W.abs())
    out, columns = W.shape
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.randn(size, generator=generator) / 1000 for size in ((out, rank), (rank, columns)))
    if values == "bf16":
        S = W if mask is None else W * mask
        return SparseLowRankLinear(S.to(dtype), U.to(dtype), V.to(dtype), weight.bias)
    grid = make_grid(values, levels)
    if grid is None:
        raise SystemExit(f"There are no values of type {values}.")
    found = stored_grid(grid_of_largest(W, grid, masked=mask is not None))
    S = found.decode(found.encode(W))
    S = S if mask is None else S.masked_fill(~mask, 0)
    steps = torch.full((rank,), 2.0**-14).bfloat16()
    U, V = ((part / 2.0**-14).round().clamp(-127, 127) * 2.0**-14 for part in (U, V))
    layer = SparseLowRankLinear(S.to(dtype), U.to(dtype), V.to(dtype), weight.bias)
    layer.stored = StoredForm(found, FactorScales(steps, steps) if rank else None, dtype)
    return layer


def stored_grid(values: GridValues) -> GridValues:
    """Return a grid as a solver would leave it: the levels of a book are integers of a byte, times 2⁻⁶, in 16 bits."""
    if values.grid.levels != "book":
        return values
    units = values.levels * (127 / values.levels[-1])
    levels = (units.round() * 2**-6).bfloat16()
    return replace(
        values, levels=levels, scale=(values.scale.float() * values.levels[-1] / levels[-1].float()).bfloat16()
    )


def copy_block(writer: CheckpointWriter, decoder: Decoder, i: int) -> None:
    """Write the first block's file again, under the names of block i."""
    first, other = writer._path(0), writer._path(i)  # noqa: SLF001 - where it writes
    with first.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = file.read(size).decode().replace(decoder.layer_name(0, ""), decoder.layer_name(i, "")).encode()
        header += b" " * (-len(header) % 8)
        with other.open("wb") as copy:
            copy.write(len(header).to_bytes(8, "little") + header)
            shutil.copyfileobj(file, copy)


@torch.no_grad()
def write_form(source: str, form: str, given: argparse.Namespace, out: Path) -> None:
    """Write a model in a form, one block after the other."""
    values, _, pattern = form.partition(":")
    opened = open_model(source, dtype=given.dtype)
    model, decoder = opened.model, Decoder.of(opened.model)
    with quantised(model, given.ends, given.ends):
        writer = CheckpointWriter(out, model, decoder)
        names = [decoder.layer_name(i, name) for i in range(len(decoder)) for name in decoder.weights(i)]
        for i, block in enumerate(decoder.blocks):
            if i and given.copies:
                copy_block(writer, decoder, i)
            else:
                for weight in decoder.weights(i).values():
                    weight.put(packed(weight, values, pattern, given.rank, given.levels))
                writer.write_block(i, block)
            block.to("meta")  # written; its memory is free
        writer.write_rest(model)
        writer.finish(model, opened.tokenizer, patterns=dict.fromkeys(names, pattern))


def main() -> None:
    """Write every form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--forms", default="bf16:16:32,int8:16:32,int4:dense")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--levels", default="auto", choices=("auto", "integer", "half", "book"))
    parser.add_argument("--ends", default="int8", choices=("keep", "int8", "int4"))
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--dtype", default="auto", help="in which the model is opened; a .gguf file opens in float16")
    parser.add_argument("--copies", action="store_true")
    given = parser.parse_args()
    source = given.source
    if source in SHAPES:
        source = str(given.out / "dense")
        if not (given.out / "dense" / "config.json").exists():
            write(SHAPES[given.source], given.blocks, given.out / "dense")
    for form in given.forms.split(","):
        folder = given.out / form.replace(":", "-")
        write_form(source, form, given, folder)
        print(folder)


if __name__ == "__main__":
    main()
