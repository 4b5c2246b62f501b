"""The command line documented with the 3BASiL paper, as a thin translation to sparlow.

    python run.py --model_name_or_path MODEL --output_dir DIR --do_eval --compression_alg 3basil
        --compression_ratio 0.5 --prunen 0 --prunem 0 --rank_ratio -1 --lora_num_ranks 128

Every documented argument is in ``ARGUMENTS`` with its meaning and default; a default that differs says so. The
equivalent ``sparlow compress`` command is printed first: whoever starts anew should use that one.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sparlow
from sparlow.algorithms import find
from sparlow.cli import display
from sparlow.cli.evaluating import in_domain_of, require_numbers, show_evaluations
from sparlow.cli.options import split
from sparlow.errors import InputError, RunError
from sparlow.evaluation.tasks import LoadedTasks, load_tasks
from sparlow.files import write_json
from sparlow.model.loading.source import open_model, upcast_for_cpu
from sparlow.recipe.recipe import Recipe

DENSE = "dense"
CORPORA = "wikitext2,ptb,c4"
ALGORITHMS = (
    *("sparsegpt", "alps", "wanda", "3basil", "oats", "hassle-free-sparsegpt", "hassle-free-alps"),
    *("eora_sparsegpt", "eora_alps", DENSE),
)


@dataclass(frozen=True)
class Argument:
    """One argument: how it is read, what it stands for if left out (as typed, where it is a flag), what it means."""

    name: str
    kind: Any
    default: Any
    help: str


def flag(text: str) -> bool:
    """Read True or False, as the paper's commands write them."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"Write True or False, not {text}.")
    return text.lower() == "true"


ARGUMENTS = (
    Argument("model_name_or_path", str, None, "hub id, directory or .gguf file (required)"),
    Argument("output_dir", str, None, "directory for the result; an unfinished one is resumed (required)"),
    Argument("compression_alg", str, "3basil", ", ".join(ALGORITHMS)),
    Argument("compression_ratio", float, -1.0, "sparsity of S or, with --rank_ratio, fraction of all values removed"),
    Argument("prunen", int, 0, "N of N:M: how many of M are kept; 0 for unstructured"),
    Argument("prunem", int, 0, "M of N:M; 0 for unstructured"),
    Argument("rank_ratio", float, -1.0, "share of the kept values in the low-rank part; -1 for a fixed rank"),
    Argument("lora_num_ranks", int, 64, "fixed rank, where --rank_ratio is -1; also of a fine-tuned pruned model"),
    Argument("enable_transformer_matching", flag, "True", "train every block towards the dense one after compression"),
    Argument("chunk_size", int, 8, "windows in each step of transformer matching"),
    Argument("n_iters", int, 20, "epochs of transformer matching"),
    Argument("lr_init", float, 2e-5, "learning rate of transformer matching"),
    Argument(
        "enable_owl_deltas",
        flag,
        "False",
        "non-uniform sparsity by OWL, measured on the data (documented default: True, which had an effect only where a "
        "file of deltas had been computed beforehand)",
    ),
    Argument("nsamples", int, 128, "calibration windows"),
    Argument("seqlen", int, 2048, "tokens in each window"),
    Argument("calibration_dataset", str, "c4", "c4, wikitext2, ptb or any corpus of sparlow"),
    Argument("percdamp", float, 0.01, "absolute damping: adds this × mean(diag H) to the diagonal of H"),
    Argument("hess_diag", flag, "False", "also use relative damping, see --hess_percdamp"),
    Argument(
        "hess_percdamp", float, 0.005, "relative damping: adds this × diag(H) to the diagonal of H, with --hess_diag"
    ),
    Argument("seed", int, 42, "random seed for selecting the calibration windows"),
    Argument("n_iters_oats_hassle_free", int, 80, "rounds of oats and hassle-free"),
    Argument("per_device_eval_batch_size", int, 8, "sequences in each pass through the model in zero-shot tasks"),
    Argument("dataset_name", str, "c4", "text to fine-tune on"),
)
OWN = (  # not in the paper's command line: what is needed where its data sets cannot be reached
    Argument("eval_datasets", str, CORPORA, "corpora or files for perplexity with --do_eval"),
    Argument("eval_tasks", str, "paper", "zero-shot tasks with --do_eval; '' for none"),
    Argument("task_path", str, None, "directory of task files, which take precedence over lm-eval's"),
    Argument(
        "limit", int, None, "maximum number of windows of each text and of questions of each task, with --do_eval"
    ),
    Argument("train_steps", int, 500, "number of fine-tuning steps with --do_train"),
    Argument("block_size", int, 1024, "tokens in each window of fine-tuning"),
)
SWITCHES = {
    "do_eval": "measure perplexity and the eight zero-shot tasks",
    "do_train": "fine-tune the low-rank part after compression",
    "overwrite_output_dir": "replace a finished result",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Translate, compress, evaluate, fine-tune; 0 done, 1 the run failed, 2 bad usage or input."""
    args = _parser().parse_args(arguments)
    try:
        _run(args)
    except (InputError, RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - a script
        return 2 if isinstance(error, InputError) else 1
    return 0


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The recipe that the arguments stand for."""
    algorithm, _ = find(args.compression_alg)
    if (args.prunen == 0) != (args.prunem == 0):
        raise InputError("Only one of --prunen and --prunem is 0. Give both, or neither for an unstructured pattern.")
    fields: dict[str, Any] = {
        "algorithm": args.compression_alg,
        "options": {"rounds": args.n_iters_oats_hassle_free} if "rounds" in algorithm.options else {},
        "allocate": "owl" if args.enable_owl_deltas and not args.prunem else "uniform",
        "calibration": args.calibration_dataset,
        "samples": args.nsamples,
        "seqlen": args.seqlen,
        "seed": args.seed,
        "bos": "never",  # the paper's windows hold text only
        "embedding": "keep",  # as in the paper
        "head": "keep",
        "damping": args.percdamp,
        "relative_damping": args.hess_percdamp if args.hess_diag else 0.0,
    }
    if args.enable_transformer_matching:
        matching = {"match_epochs": args.n_iters, "match_lr": args.lr_init, "match_batch": args.chunk_size}
        fields |= {"match": True, "match_preset": "paper", **matching}
    return Recipe(**fields, **_budget(args, prunes=algorithm.kind == "pruner"))


def without_effect(args: argparse.Namespace) -> list[str]:
    """The arguments that were given, are not what they are by default, and do nothing beside the others."""
    dense = args.compression_alg == DENSE
    algorithm = None if dense else find(args.compression_alg)[0]
    prunes = algorithm is not None and algorithm.kind == "pruner"
    matching = {"n_iters", "lr_init", "chunk_size"}
    idle: dict[str, bool] = {
        "compression_ratio": bool(args.prunem) and (args.rank_ratio < 0 or prunes),
        "rank_ratio": prunes,
        "lora_num_ranks": (args.rank_ratio >= 0 and not prunes) or (prunes and not args.do_train),
        "enable_owl_deltas": bool(args.prunem),
        "hess_percdamp": not args.hess_diag,
        "n_iters_oats_hassle_free": algorithm is not None and "rounds" not in algorithm.options,
        **dict.fromkeys(matching, not args.enable_transformer_matching),
        **dict.fromkeys(("dataset_name", "train_steps", "block_size"), not args.do_train),
        **dict.fromkeys(("eval_datasets", "eval_tasks", "task_path", "limit"), not args.do_eval),
        "per_device_eval_batch_size": not args.do_eval or not args.eval_tasks,
    }
    if dense:
        evaluating = {"seqlen", "eval_datasets", "eval_tasks", "task_path", "limit", "per_device_eval_batch_size"}
        every = {argument.name for argument in ARGUMENTS} - evaluating
        idle |= dict.fromkeys(every - {"model_name_or_path", "output_dir", "compression_alg"}, True)
    usual = {
        argument.name: argument.kind(argument.default)
        for argument in (*ARGUMENTS, *OWN)
        if argument.default is not None
    }
    return [name for name, so in idle.items() if so and getattr(args, name) not in (usual.get(name), None)]


def _budget(args: argparse.Namespace, *, prunes: bool) -> dict[str, Any]:
    """Pattern and rank, or compression and share."""
    if not args.prunem and args.compression_ratio < 0:
        raise InputError("Give --compression_ratio, or --prunen and --prunem.")
    pattern = f"{args.prunen}:{args.prunem}" if args.prunem else None
    if args.rank_ratio < 0 or prunes:
        rank = None if prunes else args.lora_num_ranks
        return {"pattern": pattern or str(args.compression_ratio), "rank": rank}
    if pattern:
        return {"pattern": pattern, "compression": args.compression_ratio}
    return {"compression": args.compression_ratio, "rank_share": args.rank_ratio}


def command_of(model: str, out: str, recipe: Recipe) -> list[str]:
    """The words of the ``sparlow compress`` command that does the same."""
    usual = Recipe().to_dict()
    words = ["sparlow", "compress", model, "--out", out]
    for name, value in recipe.to_dict().items():
        if name == "options":
            words += [word for key, given in value.items() for word in ("--option", f"{key}={given}")]
        elif name == "match":
            words += ["--match"] if value else []
        elif value != usual.get(name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def _run(args: argparse.Namespace) -> None:
    out = Path(args.output_dir)
    # loaded now, so that a wrong name or missing data is known before a long run
    tasks = load_tasks(split(args.eval_tasks) if args.do_eval else (), path=args.task_path)
    if args.do_train and args.compression_alg == DENSE:
        raise InputError("--do_train starts from a compressed model. Choose another --compression_alg than dense.")
    result: str | Path = args.model_name_or_path
    useless = [f"--{name}" for name in without_effect(args)]
    if useless:
        display.err.print(f"without effect here: {', '.join(useless)}", markup=False, highlight=False)
    if args.compression_alg != DENSE:
        recipe = recipe_of(args)
        words = [*command_of(args.model_name_or_path, str(out), recipe), "--evaluate", ""]
        display.out.print(shlex.join(words), markup=False, highlight=False)
        with display.progress() as notify:
            sparlow.compress(
                args.model_name_or_path,
                recipe,
                out=out,
                evaluate=(),
                overwrite=args.overwrite_output_dir,
                notify=notify,
            )
        result = out
    if args.do_train:
        result = _fine_tuned(args, result)
    if args.do_eval:
        _evaluate(args, result, out, tasks)


def _fine_tuned(args: argparse.Namespace, result: str | Path) -> Path:
    tuned = Path(f"{args.output_dir}-finetuned")
    fresh = args.lora_num_ranks if find(args.compression_alg)[0].kind == "pruner" else None  # others keep their own
    text = {"dataset": args.dataset_name, "block_size": args.block_size, "seed": args.seed, "bos": "never"}
    sparlow.finetune(
        result, tuned, steps=args.train_steps, rank=fresh, evaluate=(), overwrite=args.overwrite_output_dir, **text
    )
    return tuned


def _evaluate(args: argparse.Namespace, result: str | Path, out: Path, tasks: LoadedTasks) -> None:
    opened = open_model(str(result))
    if opened.tokenizer is None:
        raise InputError(f"{result} has no tokenizer. Add the tokenizer's files.")
    found = sparlow.evaluate(
        upcast_for_cpu(opened.model),
        opened.tokenizer,
        evaluate=split(args.eval_datasets),
        seqlen=args.seqlen,
        limit=args.limit,
        tasks=tasks,
        batch_size=args.per_device_eval_batch_size,
    )
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "evaluation.json", {"model": str(result), **found}, indent=2)
    show_evaluations({str(result): found}, args.seqlen, in_domain_of({str(result): found}))
    require_numbers({str(result): found})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0], allow_abbrev=False)
    for argument in (*ARGUMENTS, *OWN):
        required = argument.name in ("model_name_or_path", "output_dir")
        help_text = argument.help if required else f"{argument.help} (default: {argument.default})"
        choices = ALGORITHMS if argument.name == "compression_alg" else None
        parser.add_argument(
            f"--{argument.name}",
            type=argument.kind,
            default=argument.default,
            help=help_text.replace("%", "%%"),
            required=required,
            choices=choices,
        )
    for name, meaning in SWITCHES.items():
        parser.add_argument(f"--{name}", action="store_true", help=meaning)
    return parser


if __name__ == "__main__":
    sys.exit(main())
