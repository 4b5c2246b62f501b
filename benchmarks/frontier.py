"""Perplexity against the bytes of the whole file: results of sparlow, plain rounding, and files of other programs.

    python benchmarks/frontier.py out-3.5 out-4.5 --model SMOLLM2 --text wikitext2_test.raw --round int4,int3
        --others Q4_K_M=smol-Q4_K_M.gguf,Q4_0=smol-Q4_0.gguf --json frontier.json --figure frontier.svg

Results are directories of ``sparlow compress`` that measured the text. The dense model, its layers rounded to the
nearest values of a grid, and .gguf files (opened by transformers, which decodes them; llama.cpp rounds inputs besides)
are measured here, in the same windows. Printed are a row for each, fewest bytes first, in Markdown.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from _figures import AS_IT_IS, STYLE
from _layers import machine, write_json

from sparlow.cli.demo import round_layers
from sparlow.errors import InputError
from sparlow.evaluation.perplexity import evaluate
from sparlow.linalg.grid import WHOLE_ROW, make_grid
from sparlow.linalg.nearest import nearest
from sparlow.model.forward.decoder import Decoder
from sparlow.model.loading.source import OpenedModel, open_model
from sparlow.report.records import Report

OURS, DENSE, ROUNDED, OTHERS = "sparlow", "dense", "rounded to nearest", "llama.cpp"
MARKS = {OURS: "o", DENSE: "s", ROUNDED: "x", OTHERS: "^"}
Row = dict[str, Any]


def result(folder: Path, text: str) -> Row:
    """Read what a run kept and measured."""
    report = Report.from_file(folder / "report.json")
    found, errors = report.compressed["perplexity"], report.compressed.get("perplexity_stderr", {})
    if text not in found:
        raise InputError(f"{folder} did not measure {text}, but {', '.join(found) or 'nothing'}.")
    recipe = report.recipe
    kept = f"{recipe.get('pattern')}, {recipe.get('values') or 'model'}, rank {recipe.get('rank') or 0}"
    kept = f"--bits {recipe['bits']:g}" if recipe.get("bits") else kept
    if recipe.get("match"):
        kept += f", matched on {recipe['samples']} windows"
    row = {"name": f"{recipe['algorithm']}, {kept}", "kind": OURS, "bytes": report.bytes["compressed"]}
    agreed = report.agreement.get(text)
    row |= {"divergence": None if agreed is None else agreed.divergence, "bits": report.bits_per_weight}
    return row | {"perplexity": found[text], "stderr": errors.get(text), "matched": bool(recipe.get("match"))}


def measured(opened: OpenedModel, name: str, kind: str, size: int, args: argparse.Namespace) -> Row:
    """Measure an open model."""
    tokenizer = opened.tokenizer
    if tokenizer is None:
        raise InputError(f"{opened.name} has no tokenizer.")
    found = evaluate(opened.model, tokenizer, evaluate=args.text, seqlen=args.seqlen, limit=args.limit)
    figures = {"perplexity": found["perplexity"][args.text], "stderr": found["perplexity_stderr"][args.text]}
    return {"name": name, "kind": kind, "bytes": size, "bits": None, "divergence": None, **figures}


@torch.no_grad()
def rounded(opened: OpenedModel, values: str, args: argparse.Namespace) -> Row:
    """Measure a model whose layers are rounded to a grid, its embedding and head to int8 by rows; it is changed."""
    model, of_rows = opened.model, make_grid("int8", "integer", WHOLE_ROW)
    decoder = Decoder.of(model)
    shapes = [weight.shape for i in range(len(decoder)) for weight in decoder.weights(i).values()]
    grid = round_layers(model, values)
    size = inside = sum(math.ceil(grid.bytes(shape, shape[1])) for shape in shapes)
    ends = {id(end.weight): end for end in (model.get_input_embeddings(), model.get_output_embeddings())}
    for end in ends.values():
        if of_rows is not None:
            end.weight.copy_(nearest(end.weight.float(), of_rows))
            size += math.ceil(of_rows.bytes(tuple(end.weight.shape), end.weight.shape[1]))
    rest = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    bits = {"bits": 8 * inside / sum(math.prod(shape) for shape in shapes)}
    return measured(opened, values, ROUNDED, size + 2 * rest, args) | bits


def rows_of(args: argparse.Namespace) -> list[Row]:
    """All rows, fewest bytes first."""
    rows = [result(folder, args.text) for folder in args.results]
    kept = json.loads(args.keep.read_text())["rows"] if args.keep else []
    rows += [row for row in kept if row["kind"] != OURS]
    known = {row["name"] for row in rows}
    if args.model and DENSE not in known:
        opened = open_model(args.model, dtype="float32")
        numbers = sum(p.numel() for p in opened.model.parameters())
        rows.append(measured(opened, DENSE, DENSE, 2 * numbers, args))
    for values in _listed(args.round):
        if args.model and values not in known:
            rows.append(rounded(open_model(args.model, dtype="float32"), values, args))
    for name, file in (pair.split("=", 1) for pair in _listed(args.others)):
        if name not in known:
            try:
                rows.append(measured(open_model(file, dtype="float32"), name, OTHERS, Path(file).stat().st_size, args))
            except InputError as problem:
                print(f"{name} is left out: {problem}", flush=True)
    return sorted(rows, key=lambda row: row["bytes"])


def _listed(words: str) -> list[str]:
    return [word for word in words.split(",") if word]


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    lines = ["| whole file | bits a weight | perplexity | |", "|--:|--:|--:|---|"]
    for row in rows:
        bits = "" if row["bits"] is None else f"{row['bits']:.2f}"
        name = row["name"] if row["kind"] in (OURS, DENSE) else f"{row['kind']}: {row['name']}"
        lines.append(f"| {row['bytes'] / 1e6:.1f} MB | {bits} | {row['perplexity']:.2f} | {name} |")
    return "\n".join(lines)


def draw(rows: list[Row], file: Path) -> None:
    """Write the figure: perplexity against bytes, both on logarithmic scales."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(7, 4.5))
        panel = figure.subplots()
        for i, (kind, mark) in enumerate(MARKS.items()):
            points = [(row["bytes"] / 1e6, row["perplexity"]) for row in rows if row["kind"] == kind]
            if points:
                panel.plot(*zip(*points, strict=True), mark, color=f"C{i}", label=kind)
        for row in rows:
            point = (row["bytes"] / 1e6, row["perplexity"])
            panel.annotate(row["name"], point, xytext=(4, 3), textcoords="offset points", fontsize=6, **AS_IT_IS)
        panel.set(xscale="log", yscale="log", xlabel="MB of the whole file", ylabel="perplexity")
        panel.legend(frameon=False)
        figure.savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None})


def main() -> None:
    """Collect the rows, print them, and write what was asked for."""
    args = _parser().parse_args()
    try:
        rows = rows_of(args)
    except InputError as problem:
        raise SystemExit(f"Error: {problem}") from None
    print(table(rows))
    if args.json:
        write_json(args.json, {"machine": machine(), "arguments": vars(args), "rows": rows})
    if args.figure:
        draw(rows, args.figure)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("results", type=Path, nargs="*", help="finished directories of sparlow compress")
    parser.add_argument("--text", required=True, help="on which all are measured")
    parser.add_argument("--model", help="the dense model: directory, hub id or .gguf file")
    parser.add_argument("--round", default="", help="grids to round its layers to, such as int4,int3")
    parser.add_argument("--others", default="", help="NAME=FILE.gguf of the same model, separated by commas")
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--limit", type=int, default=24)
    parser.add_argument("--keep", type=Path, metavar="FILE", help="JSON of an earlier call, whose other rows are taken")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--figure", type=Path, metavar="FILE.svg")
    return parser


if __name__ == "__main__":
    main()
