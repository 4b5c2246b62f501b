"""The command ``sparlow``: parses, calls, prints. No logic.

What is heavy is imported inside the commands, so that ``sparlow --help`` needs neither torch nor transformers.
"""

import functools
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.markup import escape

from sparlow.cli import display
from sparlow.cli.options import (
    EvaluateOptions,
    Given,
    Without,
    WriteOptions,
    expanded,
    parse_named_pairs,
    split,
)
from sparlow.cli.signals import resumable
from sparlow.errors import InputError, RunError
from sparlow.finetuning.options import FinetuneOptions
from sparlow.recipe.run_options import RunOptions
from sparlow.schema import values_of

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Compress pretrained language models into sparse plus low-rank form.",
)
UsageError: Any = typer.BadParameter.__mro__[1]  # what typer raises for a command line that it cannot read
DISTRIBUTED = "compress"  # the command that several processes may share

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Model to read: a hub id, a directory, or a .gguf file.", show_default=False),
]
Directory = Annotated[
    Path, typer.Argument(metavar="DIRECTORY", help="A directory that sparlow wrote.", show_default=False)
]
Out = Annotated[
    Path,
    typer.Option(
        metavar="DIRECTORY", rich_help_panel="Output", help="Directory to write. An unfinished one is resumed."
    ),
]
JsonFile = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", rich_help_panel="Output", help="Also write the result to this file."),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", rich_help_panel="Output", help="Replace a finished result in --out.")
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exit with 0 (done), 1 (the run failed) or 2 (bad usage or input)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments  # before the command or after it
    arguments = [argument for argument in arguments if argument != "--debug"]
    # a level lets its messages and bars through, see sparlow.evaluation.tasks
    logging.getLogger("lm_eval").setLevel(logging.WARNING if debug else logging.NOTSET)
    if _show_help(arguments):
        sys.exit(0)
    try:
        code = app(arguments, prog_name="sparlow", standalone_mode=False)
    except UsageError as error:
        _fail_usage(error)
    except Exception as error:
        if debug or not _is_foreseen(error):
            raise
        _fail(*_said(error))
    sys.exit(code if isinstance(code, int) else 0)


def _show_help(arguments: Sequence[str]) -> bool:
    """Show the help of a command if that is asked for; typer would first import pydantic to read the other options."""
    group: Any = typer.main.get_command(app)
    found = group.commands.get(arguments[0]) if arguments else None
    if found is None or not {"-h", "--help"}.intersection(arguments):
        return False
    above = group.context_class(group, info_name="sparlow", **group.context_settings)
    text = found.get_help(found.context_class(found, info_name=found.name, parent=above))
    display.out.print(text, end="" if not text else "\n", markup=False, highlight=False)  # rich has printed it, or not
    return True


def _is_foreseen(error: Exception) -> bool:
    return isinstance(error, InputError | RunError | OSError) or _is_out_of_memory(error)


def _is_out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def _said(error: Exception) -> tuple[str, int]:
    """What to tell of an error, and the exit code."""
    if _is_out_of_memory(error):
        cause = str(error).partition(".")[0]
        advice = "Reduce --samples or --seqlen, or choose another --device. The same command resumes an unfinished run."
        return f"The accelerator has too little memory ({cause}). {advice}", 1
    return str(error), 2 if isinstance(error, InputError) else 1


def _fail(message: str, code: int) -> NoReturn:
    display.err.print(f"[red]error:[/] {escape(message)}", highlight=False)
    sys.exit(code)


def _fail_usage(error: Any) -> NoReturn:  # noqa: ANN401 - of a class that typer does not export
    if type(error).__name__ != "NoArgsIsHelpError":  # making that one has printed the help
        message, context = error.format_message(), error.ctx
        command = context.command_path if context else "sparlow"
        usage = context.get_usage() if context else f"Usage: {command} COMMAND"
        display.err.print(f"[red]error:[/] {escape(message)}", highlight=False)
        display.err.print(f"{usage}\n`{command} --help` lists the options.", markup=False, highlight=False)
    sys.exit(2)


def _show_version(asked: bool) -> None:
    if asked:
        from sparlow.version import own_version

        display.out.print(f"sparlow {own_version()}", highlight=False)
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error. It may also stand after the command.")
    ] = False,
) -> None:
    del version, debug  # the callback of one and ``main`` have done all


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Make a command of a function, with the options that ``expanded`` gives it."""
    name = function.__name__

    @functools.wraps(function)
    def prepared(**values: Any) -> None:  # noqa: ANN401 - options have many types
        from sparlow.distributed import is_first, require_one

        if name != DISTRIBUTED:
            require_one(f"sparlow {name}")
        display.out.quiet = not is_first()
        _quiet_libraries()
        function(**values)

    return app.command()(expanded(prepared))


def _quiet_libraries() -> None:
    """Keep the libraries' own bars and notices out of ours."""
    from datasets.utils import disable_progress_bars
    from transformers.utils import logging

    warnings.filterwarnings("ignore", category=FutureWarning)  # for their developers
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()


def _written(out: Path, what: str) -> None:
    display.out.print(f"written to {out}: {what}", markup=False, highlight=False)


def _require_folder(file: Path | None) -> None:
    """See before the work that its result can be written."""
    if file is not None and not file.parent.is_dir():
        raise InputError(f"There is no directory {file.parent} for --json {file.name}. Create it first.")


@command
def compress(model: Model, out: Out, given: Given, run: RunOptions, write: WriteOptions) -> None:
    """Compress MODEL into the directory --out, with its perplexity beside the dense one."""
    from sparlow.run.compress import compress as run_compression

    recipe = given.recipe()
    with resumable(), display.progress() as notify:
        report = run_compression(model, recipe, out=out, **values_of(run), **values_of(write), notify=notify)
    display.show_report(report)
    _written(out, f"open {out / 'report.html'}")


@command
def plan(
    model: Model,
    given: Given,
    run: RunOptions,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIRECTORY",
            rich_help_panel="Output",
            help="Directory that would be written, to see how much disk is free.",
        ),
    ] = None,
    timed: Annotated[
        bool,
        typer.Option(
            "--time/--no-time", rich_help_panel="Output", help="Run the algorithm on small layers to predict the time."
        ),
    ] = True,
    json_file: JsonFile = None,
) -> None:
    """Predict what compress would keep and need with the same options. Reads the config of MODEL and no weights."""
    from sparlow.files import replacing
    from sparlow.planning.plan import plan as foresee

    _require_folder(json_file)
    found = foresee(model, given.recipe(), out=out, **values_of(run), timed=timed)
    display.show_plan(found)
    if json_file:
        with replacing(json_file) as partial:
            partial.write_text(found.to_json(), "utf-8")


@command
def compare(
    model: Model,
    out: Annotated[
        Path,
        typer.Option(
            metavar="DIRECTORY", rich_help_panel="Output", help="Directory to write. Finished methods in it are reused."
        ),
    ],
    given: Annotated[Given, Without(("algorithm",))],
    run: RunOptions,
    write: WriteOptions,
    algorithms: Annotated[
        list[str],
        typer.Option(rich_help_panel="Solver", help="Algorithms to compare, or all. Repeat it, or separate by commas."),
    ] = ["all"],  # noqa: B006 - typer copies it
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ALGORITHM.KEY=VALUE",
            rich_help_panel="Solver",
            help="An option of one of the algorithms. Repeat it for several.",
        ),
    ] = None,
    match: Annotated[
        str | None,
        typer.Option(
            metavar="no|yes|both",
            rich_help_panel="Matching",
            help="Train what is kept towards the dense model. both compares every algorithm without and with it.",
            show_default="no, or the recipe's",
        ),
    ] = None,
) -> None:
    """Compress MODEL with several algorithms on the same text. Writes one table and figures to --out."""
    from sparlow.algorithms import variants
    from sparlow.run.compare import compare as run_comparison
    from sparlow.run.compare import recipes_for

    names = split(algorithms)
    names = list(variants()) if names == ["all"] else names
    recipes = recipes_for(given.recipe(), names, parse_named_pairs(option or []), match)
    with resumable(), display.progress() as notify:
        found = run_comparison(model, recipes, out=out, **values_of(run), **values_of(write), notify=notify)
    display.show_comparison(found)
    _written(out, "compare.json and two figures")
    if found.failed:
        raise RunError("; ".join(f"{name}: {why}" for name, why in found.failed.items()))


@command
def evaluate(
    model: Model,
    options: EvaluateOptions,
    run: Annotated[RunOptions, Without(("offload", "evaluate", "evaluate_seqlen", "limit"))],
    dtype: Annotated[
        str,
        typer.Option(
            rich_help_panel="Machine", help="Data type of the weights: auto (as stored), float32, bfloat16 or float16."
        ),
    ] = "auto",
    json_file: JsonFile = None,
) -> None:
    """Measure MODEL, compressed or not: its perplexity, and tasks through lm-eval."""
    from sparlow.cli.evaluating import in_domain_of, measured, require_numbers
    from sparlow.evaluation.tasks import load_tasks
    from sparlow.files import write_json

    _require_folder(json_file)
    tasks = load_tasks(options.tasks, path=options.task_path, fewshot=options.fewshot)
    names = [name for name in (options.baseline, model) if name is not None]
    found = {name: measured(name, dtype, options, run, tasks) for name in names}
    in_domain = in_domain_of(found)
    display.show_evaluations(found, options.seqlen, in_domain)
    if json_file:
        said: dict[str, Any] = {name: {**found[name]} for name in found}
        for name, texts in in_domain.items():
            said[name] |= {"in_domain": texts} if texts else {}
        beside = {} if options.baseline is None else {"baseline": {"model": options.baseline, **said[options.baseline]}}
        write_json(json_file, {"model": model, "seqlen": options.seqlen, **said[model], **beside}, indent=2)
    require_numbers(found)


@command
def finetune(
    directory: Directory,
    out: Out,
    options: FinetuneOptions,
    run: Annotated[RunOptions, Without(("offload", "evaluate_seqlen"))],
    peft: Annotated[
        Path | None,
        typer.Option(
            metavar="DIRECTORY",
            rich_help_panel="Output",
            help="Also write the adapter in PEFT's form to this directory, with the plain model of all S in base.",
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Train the low-rank part of DIRECTORY by LoRA with the sparse part frozen. The result has the same form."""
    from sparlow.finetuning.finetune import finetune as run_finetuning

    with resumable("checkpoint"), display.progress() as notify:
        report = run_finetuning(
            directory,
            out,
            **values_of(options),
            peft=peft,
            evaluate=run.evaluate,
            limit=run.limit,
            device=run.device,
            overwrite=overwrite,
            trust_remote_code=run.trust_remote_code,
            notify=notify,
        )
    display.show_finetuning(report)
    _written(out, f"open {out / 'report.html'}")
    if peft:
        display.out.print(f"the adapter lies in {peft}, its base in {peft / 'base'}", markup=False, highlight=False)


@command
def inspect(
    directory: Directory,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every file and check checksums, patterns and densities.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show what is in DIRECTORY: pattern, density, rank and bytes of every layer."""
    from sparlow.cli.inspecting import show

    problems = show(directory, verify=verify, json=as_json)
    if problems:
        raise RunError("; ".join(problems))


@command
def algorithms() -> None:
    """List the algorithms with their options and defaults."""
    from sparlow.algorithms import algorithms as registered

    display.show_algorithms(registered())


@command
def demo(
    out: Annotated[
        Path, typer.Option(metavar="DIRECTORY", rich_help_panel="Output", help="Directory to write.")
    ] = Path("demo"),
    overwrite: Overwrite = False,
) -> None:
    """Run the main job on a small embedded model: compress, evaluate, generate."""
    from sparlow.cli.demo import run

    run(out, overwrite=overwrite)
