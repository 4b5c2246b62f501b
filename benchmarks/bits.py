"""What the rule behind ``--bits`` picks, and whether its alternatives would have been better: errors of real layers.

    python benchmarks/bits.py --blocks 3,15,25 --bits 3,3.5,4,4.5,5,5.5,6,7,8 --json FILE

For each number of bits the layers of a block are solved in the form that the rule picks, and in each form that it names
as an alternative. Printed is the mean relative error tr(R H Rᵀ) / tr(W H Wᵀ) of the layers, and the best alternative's
error over that of what was picked; less than 1 means that the rule picked wrongly.
"""

import argparse
from pathlib import Path
from statistics import mean
from typing import Any

from _layers import block_layers, geometric_mean, machine, write_json
from torch import Tensor

from sparlow.algorithms import find, solve
from sparlow.errors import InputError
from sparlow.linalg.gram import Gram
from sparlow.recipe.bits import Asked, Choice, Layer, alternatives, pick

HALF = 2  # bytes of a number of a 16-bit model
Layers = dict[str, tuple[Tensor, Tensor]]


def error(layers: Layers, choice: Choice, algorithm: str, effort: float | None) -> float:
    """Return the mean relative error of all layers, each solved with its budget."""
    found, _ = find(algorithm)
    errors = []
    for name, (W, H) in layers.items():
        budget, options = choice.budgets[name], {} if effort is None else {"effort": effort}
        settings: dict[str, Any] = {"grid": budget.grid, "int8_factors": budget.int8_factors}
        solved = solve(found, W.bfloat16(), Gram.damped(H), budget.pattern, budget.rank, options, **settings)
        errors.append(float(solved.stats["relative_error"]))
    return mean(errors)


def measure(layers: Layers, bits: float, algorithm: str, effort: float | None) -> list[dict[str, Any]]:
    """Return the form picked and its alternatives, each with its bits and error."""
    shapes = {name: Layer((W.shape[0], W.shape[1]), HALF) for name, (W, _) in layers.items()}
    asked = Asked(bits)
    picked = pick(shapes, asked)
    forms = [picked, *alternatives(shapes, asked, picked)]
    return [{"form": str(form), "bits": form.bits, "error": error(layers, form, algorithm, effort)} for form in forms]


def main() -> None:
    """Measure every block and number of bits, a line for each form."""
    args = _parser().parse_args()
    rows: list[dict[str, Any]] = []
    try:
        for block in map(int, args.blocks.split(",")):
            layers = block_layers(args.model, block, corpus=args.corpus, samples=args.samples, seqlen=args.seqlen)
            for bits in map(float, args.bits.split(",")):
                forms = measure(layers, bits, args.algorithm, args.effort)
                rows.append({"block": block, "bits": bits, "forms": forms})
                for form in forms:
                    print(f"block {block:3} {bits:5g} bits  {form['error']:.6f}  {form['form']}", flush=True)
    except InputError as problem:
        raise SystemExit(f"Error: {problem}") from None
    summary = {}
    for bits in dict.fromkeys(row["bits"] for row in rows):
        chosen = [row["forms"] for row in rows if row["bits"] == bits]
        ratios = [min(form["error"] for form in forms[1:]) / forms[0]["error"] for forms in chosen if forms[1:]]
        if ratios:
            summary[bits] = geometric_mean(ratios)
            print(f"{bits:5g} bits: the best alternative has {summary[bits]:.2f} of the error of what is picked")
    if args.json:
        write_json(args.json, {"machine": machine(), "arguments": vars(args), "summary": summary, "rows": rows})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", help="directory, hub id or .gguf file (default: the embedded small model)")
    parser.add_argument("--algorithm", default="3basil")
    parser.add_argument("--effort", type=float, help="of the method (default: its own)")
    parser.add_argument("--blocks", default="3,15,25")
    parser.add_argument("--bits", default="2.5,3,3.5,4,4.5,5,5.5,6,7,8")
    parser.add_argument("--corpus", default="builtin")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser


if __name__ == "__main__":
    main()
