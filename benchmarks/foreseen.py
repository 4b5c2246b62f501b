"""The memory that a plan foresees beside the peak of the run, for ten small models and recipes.

    python benchmarks/foreseen.py [--only pruning,mixture] [--json FILE [--plans]]

Cases that are left out with --only stay in FILE as they were. Models have random weights, texts are random tokens. All
plans are made in one process, each run in one of its own.
Foreseen and measured is what a run takes beyond Python and its libraries, in main memory, hidden states included
(``--offload cpu``), but for the case that says otherwise. What each case is there for, CASES says.

With its own rule glibc keeps freed tensors of up to 32 MiB for later, of which a plan counts a part; models of billions
of parameters have larger ones, which go back at once. So both plans and runs are told that freed memory goes back
(GIVE_BACK); --glibc leaves it to glibc in both.
"""

import argparse
import itertools
import json
import os
import string
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _layers import machine, write_json
from transformers import AutoConfig, AutoModelForCausalLM

MB = 1e6
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}  # bytes, from which on a freed tensor is given back at once
SPREAD = 7919  # a prime: words of a text have numbers all over the vocabulary
LLAMA = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
}
NARROW = LLAMA | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3}


@dataclass(frozen=True)
class Case:
    """A model and what is done to it.

    Attributes:
        shows: What takes the memory.
        config: Of the model, with its ``model_type``.
        recipe: Fields.
        options: Of ``compress`` and ``plan`` alike.
        dtype: Of the stored weights.
    """

    shows: str
    config: dict[str, Any]
    recipe: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"


BLOCKS = {"match": True, "match_preset": "blocks", "match_epochs": 1}
TOGETHER = {"match": True, "match_epochs": 1}
QUICK = {"algorithm": "3basil", "options": {"effort": 0.1, "max_steps": 5}}
CASES = {
    "pruning": Case("Gram matrices", LLAMA, {"samples": 16, "seqlen": 256}),
    "solving": Case("the solve of the widest layer", LLAMA, {**QUICK, "rank": 16, "samples": 16, "seqlen": 256}),
    "bfloat16": Case(
        "the same, stored in bfloat16", LLAMA, {**QUICK, "rank": 64, "samples": 16, "seqlen": 256}, dtype="bfloat16"
    ),
    "on a grid": Case(
        "values that are put on a grid",
        LLAMA,
        {"algorithm": "sparsegpt", "pattern": "dense", "values": "int4", "samples": 16, "seqlen": 256},
    ),
    "attention": Case(
        "attention without a fused kernel: 16 heads × 2048²",
        {
            "model_type": "bloom",
            "hidden_size": 256,
            "n_head": 16,
            "n_layer": 2,
            "vocab_size": 512,
        },
        {"samples": 2, "seqlen": 2048},
    ),
    "held out": Case(
        "windows that judge a training, of 400",
        NARROW,
        {**BLOCKS, "samples": 400, "seqlen": 256},
        {"offload": "disk"},
    ),
    "gradients": Case("training block by block", LLAMA, {**BLOCKS, "samples": 16, "seqlen": 256}),
    "all together": Case("training all blocks towards the logits", LLAMA, {**TOGETHER, "samples": 16, "seqlen": 256}),
    "mixture": Case(
        "eight experts and their Gram matrices",
        LLAMA
        | {
            "model_type": "mixtral",
            "hidden_size": 512,
            "intermediate_size": 1024,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        {"samples": 16, "seqlen": 256},
    ),
    "logits": Case(
        "a vocabulary of 128,000 in an evaluation",
        NARROW | {"vocab_size": 128000},
        {"samples": 8, "seqlen": 256},
        {"evaluate": ("builtin",), "limit": 8},
    ),
}


def options_of(case: Case) -> dict[str, Any]:
    """Options that plan and run share."""
    return {"device": "cpu", "offload": "cpu", "evaluate": (), **case.options}


def save(case: Case, folder: Path) -> None:
    """Write the model, with a tokenizer if it is measured on text."""
    config = AutoConfig.for_model(**{"model_type": "llama", **case.config})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=getattr(torch, case.dtype)).save_pretrained(folder)
    if "evaluate" in case.options:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        pairs = ["<unk>", *("".join(pair) for pair in itertools.product(string.printable, repeat=2))]
        tokens = {pair: number * SPREAD % config.vocab_size for number, pair in enumerate(pairs)}
        plain = Tokenizer(models.WordLevel(tokens, unk_token="<unk>"))  # noqa: S106 - no secret
        plain.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]{1,2}"), "isolated")
        PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>").save_pretrained(folder)  # noqa: S106 - the same


def foreseen(root: str) -> dict[str, dict[str, int]]:
    """Bytes of each stage of each case, beyond what a process has before."""
    import sparlow

    found = {}
    for folder in sorted(Path(root).iterdir()):
        case = CASES[folder.name]
        recipe = sparlow.Recipe(algorithm=case.recipe.get("algorithm", "wanda"), **_fields(case))
        plan = sparlow.plan(folder, recipe, timed=False, **options_of(case))
        found[folder.name] = {stage.name: stage.cpu for stage in plan.stages}
    return found


def measured(folder: str, out: str) -> dict[str, float]:
    """Compress one model in this process: bytes of its peak beyond what there was before, and seconds."""
    import psutil

    import sparlow
    import sparlow.run.compress  # the libraries are there before the run

    case = CASES[Path(folder).name]
    recipe = sparlow.Recipe(algorithm=case.recipe.get("algorithm", "wanda"), **_fields(case))
    words = case.config["vocab_size"]
    ids = torch.randint(words, (recipe.samples, recipe.seqlen), generator=torch.Generator().manual_seed(0))
    before, start = psutil.Process().memory_info().rss, time.perf_counter()
    report = sparlow.compress(folder, recipe, calibration=ids, out=out, force=True, **options_of(case))
    return {"peak": report.peak_memory["rss"] - before, "seconds": time.perf_counter() - start}


def _fields(case: Case) -> dict[str, Any]:
    return {name: value for name, value in case.recipe.items() if name != "algorithm"}


def in_a_process(*words: str, glibc: bool = True) -> Any:  # noqa: ANN401 - what a child says as JSON
    """Call a function of this file in a process of its own."""
    environment = os.environ | ({} if glibc else GIVE_BACK)
    command = [sys.executable, __file__, "--child", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment)  # noqa: S603 - this very script
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=",".join(CASES), help="cases, separated by commas")
    parser.add_argument("--glibc", action="store_true", help="leave to glibc when freed memory is given back")
    parser.add_argument("--json", type=Path, dest="json_file")
    parser.add_argument("--plans", action="store_true", help="plan anew, and take what FILE says of the runs")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        what, *words = args.child
        print(json.dumps({"foreseen": foreseen, "measured": measured}[what](*words)))
        return
    known = kept(args)
    if args.plans and not known.keys() >= {*args.only.split(",")}:
        parser.error("the file of --json has not measured all these cases with the same rule")
    with tempfile.TemporaryDirectory() as scratch:
        models, out = Path(scratch) / "models", Path(scratch) / "out"
        for name in args.only.split(","):
            save(CASES[name], models / name)
        plans, found = in_a_process("foreseen", str(models), glibc=args.glibc), {}
        print("| case | what takes the memory | foreseen | measured | measured of foreseen |\n|---|---|---|---|---|")
        for name in args.only.split(","):
            words = str(models / name), str(out / name)
            run = known[name] if args.plans else in_a_process("measured", *words, glibc=args.glibc)
            expected = max(plans[name].values())
            now = {"stages": plans[name], "foreseen": expected, "ratio": run["peak"] / expected}
            found[name] = run | now
            print(
                f"| {name} | {CASES[name].shows} | {expected / MB:.0f} MB | {run['peak'] / MB:.0f} MB | "
                f"{run['peak'] / expected:.2f} |",
                flush=True,
            )
    if args.json_file:
        write_json(args.json_file, {"machine": machine(), "glibc": args.glibc, "cases": known | found})


def kept(args: argparse.Namespace) -> dict[str, Any]:
    """Return the cases that the file has already, if memory was given back in the same way."""
    known = json.loads(args.json_file.read_text()) if args.json_file and args.json_file.exists() else {}
    return known["cases"] if known.get("glibc") == args.glibc else {}


if __name__ == "__main__":
    main()
