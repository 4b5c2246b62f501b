"""The command ``sparlow``: parses, calls, prints. No logic."""

import json
import logging
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, NoReturn

import torch
import typer
from rich.markup import escape

from sparlow.algorithms import algorithms as registered
from sparlow.algorithms import variants
from sparlow.cli import display
from sparlow.cli.options import (
    Algorithm,
    AlgorithmOption,
    Device,
    Evaluate,
    Given,
    Limit,
    Overwrite,
    Trust,
    parse_named_pairs,
    split,
    takes_recipe,
)
from sparlow.cli.signals import resumable
from sparlow.distributed import is_first, require_one
from sparlow.errors import InputError, RunError
from sparlow.evaluation.perplexity import Evaluation, require_tokenizer
from sparlow.evaluation.perplexity import evaluate as measure
from sparlow.evaluation.tasks import load_tasks
from sparlow.files import replacing, write_json
from sparlow.finetuning.finetune import finetune as run_finetuning
from sparlow.machine import pick_device
from sparlow.model.artefact.describe import describe
from sparlow.model.loading.source import open_model, upcast_for_cpu
from sparlow.progress import labelled
from sparlow.recipe.run_options import RunOptions
from sparlow.run.compress import compress as run_compression
from sparlow.run.verify import recorded_patterns, verify_artefact

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Compress pretrained language models into sparse plus low-rank form.",
)

Model = Annotated[str, typer.Argument(help="Hub id, directory, or .gguf file.")]
Out = Annotated[Path, typer.Option(help="Directory to write; an unfinished one is resumed.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the result to this file too.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exit with 0 (done), 1 (the run failed) or 2 (bad usage or input)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    if debug:
        arguments.remove("--debug")
    _quiet_libraries()
    # a level lets its messages and bars through, see sparlow.tasks
    logging.getLogger("lm_eval").setLevel(logging.WARNING if debug else logging.NOTSET)
    try:
        if arguments[:1] != ["compress"]:
            require_one(" ".join(["sparlow", *arguments[:1]]))
        display.out.quiet = not is_first()
        app(arguments)
    except (InputError, RunError, OSError) as error:
        if debug:
            raise
        _fail(str(error), 2 if isinstance(error, InputError) else 1)
    except torch.OutOfMemoryError as error:
        if debug:
            raise
        advice = "lower --samples or --seqlen, or give another --device; an unfinished --out is gone on from"
        _fail(f"the accelerator has too little memory ({str(error).partition('.')[0]}): {advice}", 1)


def _fail(message: str, code: int) -> NoReturn:
    display.err.print(f"[red]error:[/] {escape(message)}", highlight=False)
    sys.exit(code)


def _quiet_libraries() -> None:
    """Keep the libraries' own bars and notices out of ours."""
    from datasets.utils import disable_progress_bars
    from transformers.utils import logging

    warnings.filterwarnings("ignore", category=FutureWarning)  # for their developers
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()


@app.command()
@takes_recipe
def compress(
    model: Model,
    out: Out,
    given: Given,
    algorithm: Algorithm = None,
    option: AlgorithmOption = None,
) -> None:
    """Compress MODEL into the directory --out, with its perplexity beside the dense one."""
    recipe = given.recipe_of(algorithm, option)
    with resumable(), display.progress() as notify:
        report = run_compression(model, recipe, out=out, **given.run, **given.write, notify=notify)
    display.show_report(report)
    display.out.print(f"written to {out}: open {out / 'report.html'}", markup=False, highlight=False)


@app.command()
@takes_recipe
def plan(
    model: Model,
    given: Given,
    algorithm: Algorithm = None,
    option: AlgorithmOption = None,
    out: Annotated[Path | None, typer.Option(help="Directory that would be written, to see what is free.")] = None,
    timed: Annotated[
        bool, typer.Option("--time/--no-time", help="Try the algorithm on small layers, to tell how long a run takes.")
    ] = True,
    json_file: JsonFile = None,
) -> None:
    """Foresee what compress would keep and need with the same options; reads the config of MODEL, and no weights."""
    from sparlow.planning.plan import plan as foresee

    found = foresee(model, given.recipe_of(algorithm, option), out=out, **given.run, timed=timed)
    display.show_plan(found)
    if json_file:
        with replacing(json_file) as partial:
            partial.write_text(found.to_json(), "utf-8")


@app.command()
@takes_recipe
def compare(
    model: Model,
    out: Annotated[Path, typer.Option(help="Directory to write; what is finished there is not done again.")],
    given: Given,
    algorithms: Annotated[str, typer.Option(help="Comma-separated names, or all.")] = "all",
    option: Annotated[list[str] | None, typer.Option(help="ALGORITHM.key=value; repeatable.")] = None,
    match: Annotated[
        str | None, typer.Option(help="Train what is kept: no, yes, or both for every algorithm without and with it.")
    ] = None,
) -> None:
    """Compress MODEL by many algorithms on the same text: one table and figures in --out."""
    from sparlow.run.compare import compare as run_comparison
    from sparlow.run.compare import recipes_for

    names = list(variants()) if algorithms == "all" else split(algorithms)
    recipes = recipes_for(given.recipe(), names, parse_named_pairs(option or []), match)
    with resumable(), display.progress() as notify:
        found = run_comparison(model, recipes, out=out, options=RunOptions(**given.run), **given.write, notify=notify)
    display.show_comparison(found)
    display.out.print(f"written to {out}: compare.json and two figures", markup=False, highlight=False)
    if found.failed:
        raise RunError("; ".join(f"{name}: {why}" for name, why in found.failed.items()))


@app.command()
def evaluate(
    model: Model,
    perplexity: Annotated[str, typer.Option(help='Comma-separated corpora or files; "" for none.')] = "builtin",
    seqlen: Annotated[int, typer.Option(help="Tokens a window.")] = 2048,
    tasks: Annotated[str, typer.Option(help="Comma-separated: paper, mmlu, any of lm-eval or --task-path.")] = "",
    task_path: Annotated[
        Path | None, typer.Option(help="Directory of task files (.yaml); they go before lm-eval's of the same name.")
    ] = None,
    fewshot: Annotated[
        int | None, typer.Option(help="Examples before each question. [default: as the task says; mmlu 5]")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences in one pass, for tasks.")] = 8,
    limit: Annotated[
        int | None, typer.Option(help="At most so many windows of each corpus and questions of each task.")
    ] = None,
    baseline: Annotated[str | None, typer.Option(help="A second model, such as the dense one, shown beside.")] = None,
    json_file: JsonFile = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
    device: Device = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Measure MODEL, compressed or not: perplexity, and tasks through lm-eval."""
    loaded = load_tasks(split(tasks), path=task_path, fewshot=fewshot)

    def measured(name: str) -> Evaluation:
        opened = open_model(name, dtype=dtype, device=pick_device(device), trust_remote_code=trust_remote_code)
        tokenizer = require_tokenizer(opened.tokenizer, name)
        with display.progress() as notify:
            return measure(
                upcast_for_cpu(opened.model),
                tokenizer,
                perplexity_on=split(perplexity),
                seqlen=seqlen,
                limit=limit,
                tasks=loaded,
                batch_size=batch_size,
                notify=labelled(notify, after=f", {name}"),
            )

    found = {name: measured(name) for name in (baseline, model) if name is not None}
    display.show_evaluations(found, seqlen)
    if json_file:
        beside = {} if baseline is None else {"baseline": {"model": baseline, **found[baseline]}}
        record = {"model": model, "seqlen": seqlen, **found[model], **beside}
        write_json(json_file, record, indent=2)


@app.command()
def finetune(
    directory: Annotated[Path, typer.Argument(help="A directory that sparlow wrote.")],
    out: Out,
    dataset: Annotated[str, typer.Option(help="c4, wikitext2, ptb, builtin, a file or a hub data set.")] = "c4",
    steps: Annotated[int, typer.Option(help="Of the optimiser.")] = 500,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 1e-4,
    rank: Annotated[int | None, typer.Option(help="For a model that was only pruned. [default: 16]")] = None,
    block_size: Annotated[int, typer.Option(help="Tokens a window.")] = 1024,
    batch: Annotated[int, typer.Option(help="Windows at a time.")] = 4,
    accumulate: Annotated[int, typer.Option(help="Batches a step.")] = 4,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16.")] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    report_to: Annotated[str, typer.Option(help="Trainer's integrations, such as tensorboard.")] = "none",
    peft: Annotated[Path | None, typer.Option(help="Folder for the adapter in PEFT's form, with its base.")] = None,
    evaluate: Evaluate = "builtin",
    limit: Limit = None,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Of the text and its order.")] = 0,
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
) -> None:
    """Train the low-rank part of DIRECTORY by LoRA, the sparse part frozen; the result has the same form."""
    with resumable("checkpoint"), display.progress() as notify:
        report = run_finetuning(
            directory,
            out,
            dataset=dataset,
            steps=steps,
            lr=lr,
            rank=rank,
            block_size=block_size,
            batch=batch,
            accumulate=accumulate,
            bf16=bf16,
            gradient_checkpointing=gradient_checkpointing,
            report_to=report_to,
            peft=peft,
            evaluate=split(evaluate),
            limit=limit,
            device=device,
            seed=seed,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            notify=notify,
        )
    display.show_finetuning(report)
    display.out.print(f"written to {out}: open {out / 'report.html'}", markup=False, highlight=False)
    if peft:
        display.out.print(f"the adapter lies in {peft}, its base in {peft / 'base'}", markup=False, highlight=False)


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
    shards = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    linear = sum(layer.bytes for layer in layers)
    weights = sum(layer.shape[0] * layer.shape[1] for layer in layers)
    values = sum(layer.kept + layer.rank * sum(layer.shape) for layer in layers)
    bits = 8 * linear / max(weights, 1)
    if as_json:
        rows = [{**asdict(layer), "pattern": patterns.get(layer.name)} for layer in layers]
        totals = {
            "bytes": shards,
            "linear_bytes": linear,
            "values": values,
            "weights": weights,
            "bits_per_weight": bits,
        }
        print(json.dumps({"layers": rows, **totals, "problems": problems if verify else None}, indent=2))  # noqa: T201
    else:
        display.show_layers(layers, patterns)
        display.out.print(
            f"{len(layers)} layers, {values:,} of {weights:,} values, {linear:,} bytes, {bits:.2f} bits a weight; "
            f"all shards {shards:,} bytes",
            highlight=False,
        )
        if verify and not problems:
            display.out.print("verified: checksums, shapes, patterns and densities are as recorded", highlight=False)
    if problems:
        raise RunError("; ".join(problems))


@app.command()
def algorithms() -> None:
    """List the algorithms with their options and defaults."""
    display.show_algorithms(registered())


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory to write.")] = Path("demo"),
    overwrite: Overwrite = False,
) -> None:
    """Run the main job on a small embedded model: compress, evaluate, generate."""
    from sparlow.cli.demo import run

    run(out, overwrite=overwrite)
