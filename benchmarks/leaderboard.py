"""Keeps LEADERBOARD.md, a row a compressed model, and EXPERIMENTS.md, a line for everything that was tried.

    python benchmarks/leaderboard.py RESULT --command "sparlow compress … && sparlow evaluate …"
        [--evaluation FILE.json] [--wikitext2 NAME] [--c4 NAME] [--commit COMMIT] [--note TEXT]
    python benchmarks/leaderboard.py --note TEXT

RESULT is a finished directory of ``sparlow compress``. Perplexities and divergence are those of its report, or of
FILE.json, which ``sparlow evaluate RESULT --baseline DENSE --json FILE.json`` wrote. A row of the same model and
command is replaced. Of more than 15 rows the one goes that is dominated most: whose perplexities lie highest above
those of another row of the model that takes no more bytes. What has no directory, such as an idea that did not pay, is
noted without one.
"""

import argparse
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import _checkout
from _board import BOARD, COMMIT_DIGITS, LOG, TEXTS, Row, append, board, entry, read_board, with_row, write

from sparlow.errors import InputError, RunError
from sparlow.files import parse_json
from sparlow.recipe.recipe import Recipe
from sparlow.report.records import Report
from sparlow.text import WITH_BOS

FOLDER = Path(__file__).resolve().parent


def row_of(result: Path, command: str, evaluation: Path | None, texts: Mapping[str, str | None], commit: str) -> Row:
    """Read a finished result.

    Args:
        result: Its directory.
        command: That made and measured it.
        evaluation: What ``sparlow evaluate --json`` wrote of it; None to take the figures of its report.
        texts: Names of the texts, by column; None to find the only one that fits.
        commit: Of the sources.

    Raises:
        InputError: Something is missing, or contradicts the rest.
    """
    report, recipe = Report.from_file(result / "report.json"), Recipe.from_file(result / "recipe.toml")
    if not report.parameters or "total" not in report.seconds:
        raise InputError(f"The report of {result} does not tell parameters or seconds. Compress again.")
    figures = _figures(report, result, evaluation)
    names = {column: _text(column, name, figures["perplexity"]) for column, name in texts.items()}
    if not any(names.values()):
        raise InputError(f"{result} was measured on neither WikiText-2 nor C4. Give --evaluation, --wikitext2 or --c4.")
    if names["c4"] and overlap(recipe.calibration, names["c4"]):
        raise InputError(f"{names['c4']} shares records with the calibration text. Evaluate on others, as by #601-800.")
    shown = {column: _perplexity(figures, name) for column, name in names.items()}
    taken = report.seconds["total"] - report.seconds.get("evaluate", 0) + report.finetuning.get("seconds", 0)
    return Row(
        bits_a_weight=f"{8 * report.bytes['linears_compressed'] / report.values['linears_dense']:.2f}",
        bits_a_parameter=f"{8 * report.bytes['compressed'] / report.parameters['model']:.2f}",
        bytes=f"{report.bytes['compressed']:,}",
        **shown,
        divergence=_divergence(figures, names["c4"]),
        minutes=f"{taken / 60:.1f}",
        model=Path(report.model).name,
        what=_what(report, recipe),
        commit=commit[:COMMIT_DIGITS] + ("-dirty" if commit.endswith("-dirty") else ""),
        processor=str(report.machine.get("accelerator") or report.machine.get("cpu") or ""),
        command=" ".join(command.replace("\\\n", " ").split()),
    )


def overlap(calibration: str, text: str) -> bool:
    """Whether two texts share records, of which ``FILE#601-800`` names some and ``FILE`` all."""
    (one, first), (other, second) = (_records(name) for name in (calibration, text))
    return Path(one).name == Path(other).name and max(first[0], second[0]) <= min(first[1], second[1])


def _records(name: str) -> tuple[str, tuple[float, float]]:
    found = re.fullmatch(r"(.+)#(\d+)-(\d+)", name)
    return (found[1], (int(found[2]), int(found[3]))) if found else (name, (1, math.inf))


def _figures(report: Report, result: Path, evaluation: Path | None) -> dict[str, Any]:
    """Perplexities, their errors and agreements, each by the name of the text, as ``report.json`` has them."""
    if evaluation is not None:
        data = parse_json(evaluation)
        if not isinstance(data.get("perplexity"), dict) or "model" not in data:
            raise InputError(f"{evaluation} is not what sparlow evaluate --json writes. Evaluate {result} again.")
        if Path(data["model"]).resolve().name != result.resolve().name:
            raise InputError(f"{evaluation} is about {data['model']}, not about {result}. Evaluate {result}.")
        return data
    if report.finetuning:
        raise InputError(f"The report of {result} is that of the model before its fine-tuning. Give --evaluation.")
    return {**report.compressed, "agreement": parse_json(result / "report.json").get("agreement")}


def _text(column: str, name: str | None, perplexities: Mapping[str, float]) -> str | None:
    """The name of the text that a column shows: the one that was given, else the only one that fits, if any does."""
    if name is not None:
        if name not in perplexities:
            raise InputError(f"No perplexity on {name} is there. Choose one of: {', '.join(perplexities) or 'none'}.")
        return name
    fit = [text for text in perplexities if TEXTS[column] in Path(text).name.lower() and not text.endswith(WITH_BOS)]
    if len(fit) > 1:
        raise InputError(f"More than one text may be meant by {column}: {', '.join(fit)}. Give --{column}.")
    return fit[0] if fit else None


def _perplexity(figures: Mapping[str, Any], name: str | None) -> str:
    if name is None:
        return ""
    value = float(figures["perplexity"][name])
    if not math.isfinite(value):
        raise InputError(f"The perplexity on {name} is {value}. A model that is damaged has no place in the table.")
    return _with_error(value, (figures.get("perplexity_stderr") or {}).get(name), 2)


def _divergence(figures: Mapping[str, Any], name: str | None) -> str:
    found = (figures.get("agreement") or {}).get(name)
    if not found or found.get("divergence") is None:
        return ""
    return _with_error(found["divergence"], found.get("divergence_stderr"), 4)


def _with_error(value: float, stderr: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" + ("" if stderr is None else f" ± {stderr:.{digits}f}")


def _what(report: Report, recipe: Recipe) -> str:
    """Return method, pattern, values and rank in a few words."""
    patterns = dict.fromkeys(layer.pattern for layer in report.layers)
    values = recipe.to_dict().get("values", "model")
    ranks = sorted({layer.rank for layer in report.layers})
    words = [recipe.algorithm, next(iter(patterns)) if len(patterns) == 1 else "mixed patterns"]
    words += [values] if values != "model" else []
    words += [f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"] if any(ranks) else []
    words += ["matched"] if recipe.match else []
    words += ["fine-tuned"] if report.finetuning else []
    return ", ".join(words)


def main() -> None:
    """Add a row and a line, or only a line."""
    parser = _parser()
    args = parser.parse_args()
    commit = args.commit or _checkout.commit()
    try:
        if args.result is None:
            if not args.note:
                parser.error("Give a result, or --note.")
            append(args.folder / LOG, entry(None, "", args.note, commit))
            return
        if not args.command:
            parser.error("Give --command, by which the result can be made again.")
        row = row_of(args.result, args.command, args.evaluation, {name: getattr(args, name) for name in TEXTS}, commit)
        before = read_board(args.folder / BOARD)
        rows, dropped = with_row(before, row)
        fate = "dropped at once: dominated most" if row in dropped else "in the table"
        if row.key in {other.key for other in before}:
            fate += ", in the place of an earlier figure"
        write(args.folder / BOARD, board(rows))
        append(args.folder / LOG, entry(row, fate, args.note, commit))
    except (InputError, RunError) as error:
        parser.error(str(error))
    print(f"{row.what}: {fate}, which has {len(rows)} rows." + "".join(f"\nDropped: {one.what}." for one in dropped))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("result", type=Path, nargs="?", help="finished directory of sparlow compress")
    parser.add_argument("--command", default="", help="the exact command that made and measured it")
    parser.add_argument("--evaluation", type=Path, help="what sparlow evaluate --json wrote of it")
    parser.add_argument("--wikitext2", help="name of the text of this column, where it does not tell")
    parser.add_argument("--c4", help="likewise: records that calibration did not see")
    parser.add_argument("--commit", default="", help="of the sources that made it; by default that of this checkout")
    parser.add_argument("--note", default="", help="what a reader of the log should know")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the two pages are")
    return parser


if __name__ == "__main__":
    main()
