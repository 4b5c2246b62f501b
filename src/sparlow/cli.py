"""The command ``sparlow``: parses, calls, prints. No logic."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from sparlow import console
from sparlow.algorithms import algorithms as registered
from sparlow.compression import compress as run_compression
from sparlow.compression import pick_device
from sparlow.errors import InputError, RunError
from sparlow.evaluation import evaluate as measure
from sparlow.evaluation import require_tokenizer
from sparlow.model.inspection import describe
from sparlow.model.shards import replacing
from sparlow.model.source import for_computing, open_model
from sparlow.recipe import Recipe
from sparlow.verification import recorded_patterns, verify_artefact

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Compress pretrained language models into sparse plus low-rank form.",
)

Model = Annotated[str, typer.Argument(help="Hub id, directory, or .gguf file.")]
Out = Annotated[Path, typer.Option(help="Directory to write; an unfinished one is resumed.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, …")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")]
Recipes = Annotated[Path | None, typer.Option(help="TOML file; options given here take precedence over it.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exit with 0 (done), 1 (the run failed) or 2 (bad usage or input)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    if debug:
        arguments.remove("--debug")
    _quiet_libraries()
    try:
        app(arguments)
    except (InputError, RunError, OSError) as error:
        if debug:
            raise
        console.err.print(f"[red]error:[/] {escape(str(error))}", highlight=False)
        sys.exit(2 if isinstance(error, InputError) else 1)


def _quiet_libraries() -> None:
    """Keep the libraries' own bars and notices out of ours."""
    from datasets.utils import disable_progress_bars
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()


@app.command()
def compress(
    model: Model,
    out: Out,
    recipe: Recipes = None,
    algorithm: Annotated[str | None, typer.Option(help="See `sparlow algorithms`. [default: 3basil]")] = None,
    option: Annotated[list[str] | None, typer.Option(help="key=value of the algorithm's own; repeatable.")] = None,
    pattern: Annotated[str | None, typer.Option(help="2:4, 4:8, … or the fraction removed. [default: 2:4]")] = None,
    rank: Annotated[int | None, typer.Option(help="Of the low-rank part. [default: 64; pruners 0]")] = None,
    calibration: Annotated[
        str | None, typer.Option(help="c4, wikitext2, ptb, builtin, a file or a hub data set. [default: c4]")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration windows. [default: 128]")] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens a window. [default: 2048]")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the choice of windows. [default: 0]")] = None,
    damping: Annotated[float | None, typer.Option(help="Times mean(diag H), added. [default: 0.005]")] = None,
    relative_damping: Annotated[float | None, typer.Option(help="Times diag(H), added. [default: 0.005]")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16, float16. [default: auto]")] = None,
    device: Device = "auto",
    evaluate: Annotated[str, typer.Option(help="Comma-separated corpora or files for perplexity.")] = "builtin",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a finished result in --out.")] = False,
    trust_remote_code: Trust = False,
) -> None:
    """Compress MODEL into the directory --out, with its perplexity beside the dense one."""
    given = {
        "algorithm": algorithm,
        "pattern": pattern,
        "rank": rank,
        "calibration": calibration,
        "samples": samples,
        "seqlen": seqlen,
        "seed": seed,
        "damping": damping,
        "relative_damping": relative_damping,
        "dtype": dtype,
    }
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    base = Recipe.from_file(recipe) if recipe else Recipe()
    if option or (algorithm and algorithm != base.algorithm):
        kept = {} if algorithm and algorithm != base.algorithm else base.options
        changes["options"] = {**kept, **_parse_pairs(option or [])}
    with _resumable(), console.progress() as notify:
        report = run_compression(
            model,
            base.changed(**changes),
            out=out,
            evaluate=_split(evaluate),
            device=device,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            notify=notify,
        )
    console.show_report(report)
    console.out.print(f"written to {out}: open {out / 'report.html'}", markup=False, highlight=False)


@app.command()
def evaluate(
    model: Model,
    perplexity: Annotated[str, typer.Option(help="Comma-separated corpora or files.")] = "builtin",
    seqlen: Annotated[int, typer.Option(help="Tokens a window.")] = 2048,
    limit: Annotated[int | None, typer.Option(help="At most so many windows of each corpus.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result to this file too.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
    device: Device = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Measure MODEL, compressed or not."""
    opened = open_model(model, dtype=dtype, device=pick_device(device), trust_remote_code=trust_remote_code)
    tokenizer = require_tokenizer(opened.tokenizer, model)
    found = measure(
        for_computing(opened.model), tokenizer, perplexity_on=_split(perplexity), seqlen=seqlen, limit=limit
    )
    console.show_perplexities(found["perplexity"], seqlen)
    if json_file:
        with replacing(json_file) as partial:
            partial.write_text(json.dumps({"model": model, "seqlen": seqlen, **found}, indent=2) + "\n", "utf-8")


@app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(help="A directory that sparlow wrote.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read everything: checksums, pattern, density.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show what is in DIRECTORY: pattern, density, rank and bytes of every layer."""
    problems = verify_artefact(directory) if verify else []
    try:
        layers, patterns = describe(directory), recorded_patterns(directory)
    except InputError as error:
        if problems:
            raise RunError("; ".join(problems)) from error
        raise
    weights = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    linear = sum(layer.bytes for layer in layers)
    bits = 8 * linear / max(sum(layer.shape[0] * layer.shape[1] for layer in layers), 1)
    if as_json:
        rows = [{**asdict(layer), "pattern": patterns.get(layer.name)} for layer in layers]
        totals = {"bytes": weights, "linear_bytes": linear, "bits_per_weight": bits}
        print(json.dumps({"layers": rows, **totals, "problems": problems if verify else None}, indent=2))  # noqa: T201
    else:
        console.show_layers(layers, patterns)
        console.out.print(
            f"{len(layers)} layers, {linear:,} bytes, {bits:.2f} bits a weight; all shards {weights:,} bytes",
            highlight=False,
        )
        if verify and not problems:
            console.out.print("verified: checksums, shapes, patterns and densities are as recorded", highlight=False)
    if problems:
        raise RunError("; ".join(problems))


@app.command()
def algorithms() -> None:
    """List the algorithms with their options and defaults."""
    console.show_algorithms(registered())


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory to write.")] = Path("demo"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a finished result in --out.")] = False,
) -> None:
    """Run the main job on a small embedded model: compress, evaluate, generate."""
    from sparlow.demo import run

    run(out, overwrite=overwrite)


@contextmanager
def _resumable() -> Iterator[None]:
    """Say how to go on after Ctrl-C, which typer then turns into the exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        console.err.print("stopped: the same command resumes the run from its last finished block")
        raise


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def _parse_pairs(pairs: Sequence[str]) -> dict[str, str]:
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise InputError(f"--option {pair} is not understood: write key=value.")
        found[name] = value
    return found
