"""The options that commands of ``sparlow`` share, and how they are read."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from sparlow.errors import InputError
from sparlow.recipe.recipe import Recipe

Device = Annotated[str, typer.Option(help="Device that computes: auto, cpu, cuda, cuda:1, mps, …")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")]
Evaluate = Annotated[str, typer.Option(help='Corpora or files to measure perplexity on, comma-separated; "" for none.')]
Limit = Annotated[int | None, typer.Option(help="At most so many windows of each corpus.")]
Algorithm = Annotated[str | None, typer.Option(help="See `sparlow algorithms`. \\[default: 3basil]")]
AlgorithmOption = Annotated[list[str] | None, typer.Option(help="key=value, an option of the algorithm; repeatable.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a finished result in --out.")]


@dataclasses.dataclass(frozen=True)
class Given:
    """What was typed: a recipe file, the options beside it, which take precedence, and how to run and measure.

    Attributes:
        base: The file's recipe, or the default one.
        changes: Fields of it that were typed.
        run: Keyword arguments that ``sparlow.compress``, ``sparlow.comparison.compare`` and ``sparlow.plan`` share.
        write: Those of them that only say what may be written.
    """

    base: Recipe
    changes: dict[str, Any]
    run: dict[str, Any]
    write: dict[str, Any]

    def recipe(self, **more: object) -> Recipe:
        """The file's recipe with the options, and ``more``."""
        return self.base.changed(**self.changes, **more)

    def recipe_of(self, algorithm: str | None, option: Sequence[str] | None) -> Recipe:
        """The recipe with one algorithm; another one than the file's does not take over the file's options of it."""
        more: dict[str, Any] = {} if algorithm is None else {"algorithm": algorithm}
        if option or (algorithm and algorithm != self.base.algorithm):
            kept = {} if algorithm and algorithm != self.base.algorithm else self.base.options
            more["options"] = {**kept, **parse_pairs(option or [])}
        return self.recipe(**more)


def given_options(
    recipe: Annotated[Path | None, typer.Option(help="TOML file; options given here take precedence over it.")] = None,
    pattern: Annotated[
        str | None, typer.Option(help="Of the sparse part: 16:32, 2:4, …, or the fraction removed. \\[default: 16:32]")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the low-rank part. \\[default: 64; 0 for pruners]")] = None,
    compression: Annotated[
        float | None,
        typer.Option(help="Fraction of the values removed; with --pattern or --rank-share, sets the rank."),
    ] = None,
    rank_share: Annotated[
        float | None, typer.Option(help="Share of the kept values that goes to the low-rank part.")
    ] = None,
    allocate: Annotated[
        str | None,
        typer.Option(help="How sparsity is divided among layers: uniform, owl or error. \\[default: uniform]"),
    ] = None,
    owl: Annotated[bool | None, typer.Option("--owl/--no-owl", help="The same as --allocate owl or uniform.")] = None,
    owl_spread: Annotated[
        float | None, typer.Option(help="OWL's λ: densities of blocks vary over a range of 2λ. \\[default: 0.08]")
    ] = None,
    owl_threshold: Annotated[
        float | None, typer.Option(help="OWL: an outlier exceeds this many times the mean. \\[default: 5]")
    ] = None,
    match: Annotated[
        bool | None,
        typer.Option(
            "--match/--no-match", help="Train what is kept towards the dense model afterwards. \\[default: no-match]"
        ),
    ] = None,
    match_preset: Annotated[
        str | None, typer.Option(help="How --match trains: logits, blocks or paper. \\[default: logits]")
    ] = None,
    match_epochs: Annotated[
        int | None, typer.Option(help="Epochs of --match, at most. \\[default: the preset's]")
    ] = None,
    match_lr: Annotated[
        float | None,
        typer.Option(
            help="Learning rate of --match; the preset logits gives U and V a quarter of it. \\[default: the preset's]"
        ),
    ] = None,
    match_batch: Annotated[
        int | None, typer.Option(help="Calibration windows in each step of --match. \\[default: the preset's]")
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(help="Layers to leave dense, by the end of their names; * and ? work; repeatable."),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Calibration text: c4, wikitext2, ptb, builtin, self, a file or a hub data set. \\[default: c4]"
        ),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Number of calibration windows. \\[default: 128]")] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens in each of them. \\[default: 2048]")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Random seed for selecting the calibration windows. \\[default: 0]")
    ] = None,
    damping: Annotated[
        float | None, typer.Option(help="Adds this × mean(diag H) to the diagonal of H. \\[default: 0.005]")
    ] = None,
    relative_damping: Annotated[
        float | None, typer.Option(help="Adds this × diag(H) to the diagonal of H. \\[default: 0.005]")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Type of the weights: auto (as stored), float32, bfloat16, float16. \\[default: auto]"),
    ] = None,
    device: Device = "auto",
    offload: Annotated[
        str, typer.Option(help="Where inputs of blocks are kept: cpu, disk, or auto for the fastest that fits.")
    ] = "auto",
    evaluate: Evaluate = "builtin",
    evaluate_seqlen: Annotated[
        int | None, typer.Option(help="Tokens in each window of --evaluate. \\[default: as --seqlen]")
    ] = None,
    limit: Limit = None,
    overwrite: Overwrite = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Start even if the memory or disk that is predicted exceeds what is available."),
    ] = False,
    trust_remote_code: Trust = False,
) -> Given:
    """The options that make a recipe, the algorithm left out, and those of running it."""
    typed = dict(locals())
    fields = {field.name for field in dataclasses.fields(Recipe)}
    options = {name: value for name, value in typed.items() if name in fields and value is not None}
    if owl is not None:
        meant = "owl" if owl else "uniform"
        if options.setdefault("allocate", meant) != meant:
            raise InputError(
                f"--{'owl' if owl else 'no-owl'} and --allocate {allocate} contradict each other: give one."
            )
    run = {
        "device": device,
        "offload": offload,
        "evaluate": split(evaluate),
        "evaluate_seqlen": evaluate_seqlen,
        "limit": limit,
        "trust_remote_code": trust_remote_code,
    }
    write = {"overwrite": overwrite, "force": force}
    return Given(Recipe.from_file(recipe) if recipe else Recipe(), options, run, write)


def takes_recipe(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of ``given_options`` to a command, whose parameter ``given`` receives what they make.

    An option that the command has itself, under the same name, is not added.
    """
    own = inspect.signature(command).parameters
    shared = {n: p for n, p in inspect.signature(given_options).parameters.items() if n not in own}

    @functools.wraps(command)
    def wrapper(**values: Any) -> None:  # noqa: ANN401 - options have many types
        given = given_options(**{name: values.pop(name) for name in shared})
        command(given=given, **values)

    parameters = []
    for name, parameter in own.items():
        parameters += list(shared.values()) if name == "given" else [parameter]
    keyword_only = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    wrapper.__signature__ = inspect.Signature(keyword_only)  # type: ignore[attr-defined]  # what typer reads
    wrapper.__annotations__ = {p.name: p.annotation for p in keyword_only}
    return wrapper


def split(names: str) -> list[str]:
    """Read a list separated by commas."""
    return [name.strip() for name in names.split(",") if name.strip()]


def parse_named_pairs(pairs: Sequence[str]) -> dict[str, dict[str, str]]:
    """Read ALGORITHM.key=value, each; return the options by the algorithm's name."""
    found: dict[str, dict[str, str]] = {}
    for pair, value in parse_pairs(pairs).items():
        name, dot, key = pair.rpartition(".")
        if not dot:
            raise InputError(f"--option {pair}={value} is not understood: write ALGORITHM.key=value.")
        found.setdefault(name, {})[key] = value
    return found


def parse_pairs(pairs: Sequence[str]) -> dict[str, str]:
    """Read key=value, each."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise InputError(f"--option {pair} is not understood: write key=value.")
        found[name] = value
    return found
