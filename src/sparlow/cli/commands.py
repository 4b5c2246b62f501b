"""The command ``sparlow``: parses, calls, prints. No logic.

What is heavy is imported inside the commands, so that ``sparlow --help`` needs neither torch nor transformers.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from sparlow.cli import display, listing, results
from sparlow.cli.app import app, command
from sparlow.cli.app import run as main
from sparlow.cli.comparing import CompareOptions, show_comparison, tell_times
from sparlow.cli.options import (
    EvaluateOptions,
    Given,
    Without,
    WriteOptions,
    load_plugins,
    parse_pairs,
    split,
)
from sparlow.cli.pages import Figures, HtmlFile, write_figures, write_page
from sparlow.cli.parameters import (
    Directory,
    DirectoryOrNone,
    Dtype,
    FormName,
    JsonFile,
    ListForms,
    Model,
    Models,
    OptionOfForm,
    Out,
    OutOfComparison,
    OutOfExport,
    OutOfPlan,
    Overwrite,
    Plugins,
    Prompt,
    Required,
    Timed,
    TrainedOptions,
)
from sparlow.cli.requirements import parse_requirements, require_for_finetuning, require_only_perplexity
from sparlow.cli.signals import resumable
from sparlow.errors import InputError, RunError
from sparlow.finetuning.options import FinetuneOptions
from sparlow.recipe.run_options import RunOptions
from sparlow.runtime.options import BenchmarkOptions, RunningOptions, TextOptions
from sparlow.schema import values_of

__all__ = ["app", "main"]


def _written(out: Path, what: str) -> None:
    display.out.print(f"written to {out}: {what}", markup=False, highlight=False)


@command
def compress(
    model: Model,
    out: Out,
    given: Given,
    run: RunOptions,
    write: WriteOptions,
    require: Required = None,
    figures: Figures = None,
    json_file: JsonFile = None,
) -> None:
    """Compress MODEL into the directory --out, with its perplexity beside the dense one."""
    from sparlow.cli.compressing import require_of_report, tell_needs
    from sparlow.report.charts import charts_of_run
    from sparlow.run.compress import compress as run_compression

    recipe = given.recipe()
    required = parse_requirements(require or (), measures_text=bool(run.evaluate))
    tell_needs(model, recipe, run, out)
    with resumable(), display.progress() as notify:
        report = run_compression(model, recipe, out=out, **values_of(run), **values_of(write), notify=notify)
    display.show_report(report)
    _written(out, f"open {out / 'report.html'}")
    write_figures(charts_of_run(report), figures)
    results.put(json_file, report.to_dict())
    require_of_report(required, report)


@command
def plan(
    model: Model,
    given: Given,
    run: RunOptions,
    out: OutOfPlan = None,
    timed: Timed = True,
    json_file: JsonFile = None,
) -> None:
    """Predict what compress would keep and need with the same options. Reads the config of MODEL and no weights."""
    from sparlow.cli.planning import show_plan
    from sparlow.planning.plan import plan as foresee

    found = foresee(model, given.recipe(), out=out, **values_of(run), timed=timed)
    show_plan(found)
    results.put(json_file, found.to_dict())


@command
def compare(
    model: Model,
    out: OutOfComparison,
    options: CompareOptions,
    given: Annotated[Given, Without(("algorithm", "option", "match"))],
    run: RunOptions,
    write: Annotated[WriteOptions, Without(("with_loader",))],
    figures: Figures = None,
) -> None:
    """Compress MODEL with several algorithms on the same text. Writes a page, tables and figures to --out."""
    from sparlow.evaluation.tasks import load_tasks
    from sparlow.report.compare_page import charts
    from sparlow.run.compare import compare as run_comparison

    loaded = load_tasks(split(options.tasks or ()), path=options.task_path)
    recipes = options.recipes(given)
    if options.timed:
        tell_times(model, recipes, out, run, kept=not options.reports_only)
    with resumable(), display.progress() as notify:
        found = run_comparison(
            model,
            recipes,
            out=out,
            options=run,
            tasks=loaded,
            reports_only=options.reports_only,
            overwrite=write.overwrite,
            force=write.force,
            notify=notify,
        )
    show_comparison(found)
    _written(out, f"open {out / 'compare.html'}")
    write_figures(charts(found), figures)
    if found.failed:
        raise RunError("; ".join(f"{name}: {why}" for name, why in found.failed.items()))


@command
def evaluate(
    model: Model,
    options: EvaluateOptions,
    run: Annotated[RunOptions, Without(("offload", "evaluate", "evaluate_seqlen", "limit"))],
    dtype: Dtype = "auto",
    require: Required = None,
    json_file: JsonFile = None,
) -> None:
    """Measure MODEL, compressed or not: its perplexity, and tasks through lm-eval."""
    from sparlow.cli.evaluating import (
        in_domain_of,
        measured_beside,
        require_numbers,
        require_of_evaluations,
        show_evaluations,
        unknown_agreement,
    )
    from sparlow.evaluation.tasks import load_tasks

    required = parse_requirements(require or (), measures_text=bool(options.evaluate))
    require_only_perplexity(required, relative=options.baseline is not None)
    tasks = load_tasks(options.tasks, path=options.task_path, fewshot=options.fewshot)
    found = measured_beside(model, dtype, options, run, tasks)
    in_domain = in_domain_of(found)
    show_evaluations(found, options.seqlen, in_domain, unknown_agreement(found, options.baseline))
    said: dict[str, Any] = {name: {**found[name]} for name in found}
    for name, texts in in_domain.items():
        said[name] |= {"in_domain": texts} if texts else {}
    beside = {} if options.baseline is None else {"baseline": {"model": options.baseline, **said[options.baseline]}}
    results.put(json_file, {"model": model, "seqlen": options.seqlen, **said[model], **beside})
    require_numbers(found)
    require_of_evaluations(required, found, model, options.baseline)


@command
def finetune(
    directory: Directory,
    out: Out,
    options: FinetuneOptions,
    run: Annotated[RunOptions, Without(("offload", "evaluate_seqlen"))],
    write: TrainedOptions,
    require: Required = None,
    figures: Figures = None,
    json_file: JsonFile = None,
) -> None:
    """Train the low-rank part of DIRECTORY by LoRA with the sparse part frozen. The result has the same form."""
    from sparlow.cli.compressing import measured_dense, require_of_finetuning
    from sparlow.finetuning.finetune import finetune as run_finetuning
    from sparlow.report.charts import charts_of_run

    required = parse_requirements(require or (), measures_text=bool(run.evaluate))
    if required:
        require_for_finetuning(required, run.evaluate, measured_dense(directory))
    with resumable("checkpoint"), display.progress() as notify:
        report = run_finetuning(
            directory,
            out,
            **values_of(options),
            peft=write.peft,
            evaluate=run.evaluate,
            limit=run.limit,
            device=run.device,
            overwrite=write.overwrite,
            trust_remote_code=run.trust_remote_code,
            notify=notify,
        )
    display.show_finetuning(report)
    _written(out, f"open {out / 'report.html'}")
    write_figures(charts_of_run(report), figures)
    display.show_adapter(write.peft)
    results.put(json_file, report.to_dict())
    require_of_finetuning(required, report)


@command
def inspect(
    directory: Directory,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every file and check checksums, patterns and densities.")
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Show what is in DIRECTORY: pattern, density, rank and bytes of every layer."""
    from sparlow.cli.inspecting import show

    problems = show(directory, json_file, check=verify)
    if problems:
        raise RunError(" ".join(problems))


@command
def generate(model: Model, prompt: Prompt, text: TextOptions, running: RunningOptions) -> None:
    """Let MODEL, compressed or not, go on from --prompt: its text as it comes, then tokens a second."""
    from sparlow.runtime.running import open_to_run, stream

    opened = open_to_run(model, running)
    clock = stream(opened, prompt, text, display.text)
    display.show_pace(clock)
    if not text.chat and getattr(opened.tokenizer, "chat_template", None):
        display.err.print(f"{model} has a template for chats, which --chat uses.", markup=False, highlight=False)


@command
def export(
    directory: DirectoryOrNone = None,
    out: OutOfExport = None,
    form: FormName = None,
    option: OptionOfForm = None,
    overwrite: Overwrite = False,
    show: ListForms = False,
    json_file: JsonFile = None,
) -> None:
    """Write DIRECTORY in a form that other programs open: merged, lora, compressed-tensors or gguf."""
    if show:
        from sparlow.exporting._registry import forms

        listing.show_forms(forms())
        return
    for what, given in (("DIRECTORY", directory), ("--out", out), ("--as", form)):
        if given is None:
            raise InputError(
                f"{what} is missing. Write sparlow export DIRECTORY --out OUT --as FORM; --list shows all."
            )
    from sparlow.exporting.export import export as run_export

    pairs = parse_pairs(option or [])
    with display.progress() as notify:
        found = run_export(directory, out, form=form, options=pairs, overwrite=overwrite, notify=notify)  # type: ignore[arg-type]  # none is None
    display.show_export(found)
    results.put(json_file, {"out": str(out), "form": found.form, "bytes": found.bytes, "notes": found.notes})


@command
def benchmark(
    models: Models,
    options: BenchmarkOptions,
    json_file: JsonFile = None,
    html_file: HtmlFile = None,
    figures: Figures = None,
) -> None:
    """Measure how fast MODELS run on the CPU, compressed or not, in turns; what they compute is checked."""
    from sparlow.cli.benchmarking import show_benchmark
    from sparlow.report.benchmark_page import charts
    from sparlow.runtime.benchmark import benchmark as measure

    with display.progress() as notify:
        found = measure(models, options, notify)
    show_benchmark(found)
    write_page(found.to_dict(), html_file)
    write_figures(charts(found.to_dict()), figures)
    results.put(json_file, found.to_dict())
    wrong = [row for row in found.rows if not row.same_output]
    if wrong:
        raise RunError(
            f"{len(wrong)} of {len(found.rows)} rows compute something else than their weights in float32, "
            f"{wrong[0].model} for one. Report it."
        )


@command
def algorithms(plugin: Plugins = None, json_file: JsonFile = None) -> None:
    """List the algorithms with their options and defaults."""
    from sparlow.algorithms import algorithms as registered

    load_plugins(plugin or ())
    listing.show_algorithms(registered())
    rows = [
        {
            "name": one.name,
            "aliases": [*one.aliases],
            "kind": one.kind,
            "summary": one.summary,
            "options": {name: option.shown_default for name, option in one.options.items()},
        }
        for one in registered()
    ]
    results.put(json_file, rows)


@command
def recipes(json_file: JsonFile = None) -> None:
    """List the recipes that --recipe takes by name, with what they gave where that was measured."""
    from sparlow.recipe.named import packaged

    listing.show_recipes(packaged())
    results.put(json_file, [*packaged()])


@command
def env(json_file: JsonFile = None) -> None:
    """Show the machine and what is installed, for a report of a bug."""
    from sparlow.cli.environment import environment

    found = environment()
    listing.show_env(found)
    results.put(json_file, found)


@command
def demo(
    out: Annotated[
        Path, typer.Option(metavar="DIRECTORY", rich_help_panel="Output", help="Directory to write.")
    ] = Path("demo"),
    overwrite: Overwrite = False,
) -> None:
    """Run the main job on a small embedded model: compress in two ways, evaluate, generate."""
    from sparlow.cli.demo import run

    run(out, overwrite=overwrite)
