"""The top of a run's page: one sentence, four numbers."""

import math
from dataclasses import dataclass

from sparlow.report.perplexities import FLATTERS, shown
from sparlow.report.records import Report
from sparlow.report.value_types import MODEL
from sparlow.report.wording import UNKNOWN, duration, model_name, number, percent, size


@dataclass(frozen=True)
class Tile:
    """A number at the top: what it is, itself, and a remark."""

    what: str
    value: str
    about: str


def corpus_on_top(report: Report) -> str | None:
    """The text whose perplexity stands on top: the first that does not flatter the result, if there is one."""
    now = _now(report)
    names = [name for name in shown([report.dense["perplexity"], now]) if name in now]
    apart = [name for name in names if name not in _in_domain(report)]
    return next(iter([*apart, *names]), None)


def _now(report: Report) -> dict[str, float]:
    """Perplexities of the result as it is now."""
    found = report.finetuning["perplexity"]["after"] if report.finetuning else report.compressed["perplexity"]
    return dict(found)


def _in_domain(report: Report) -> list[str]:
    return list(report.finetuning.get("in_domain", ()) if report.finetuning else report.in_domain)


def form(report: Report) -> str:
    """What was kept, in words: ``2:4 plus rank 64, values in int4``."""
    patterns = list(dict.fromkeys(layer.pattern for layer in report.layers))
    ranks = {layer.rank for layer in report.layers}
    said = patterns[0] if len(patterns) == 1 else f"{len(patterns)} patterns"
    if ranks - {0}:
        said += f" plus rank {max(ranks)}" if len(ranks) == 1 else f" plus ranks {min(ranks)} to {max(ranks)}"
    return said if report.value_types in (MODEL, "") else f"{said}, values in {report.value_types}"


def sentence(report: Report) -> str:
    """What came of the run, in one sentence."""
    sizes, tuned = report.bytes, bool(report.finetuning)
    share = sizes["compressed"] / max(sizes["dense"], 1)
    found = "was compressed and fine-tuned" if tuned else f"was compressed by {report.recipe['algorithm']}"
    text = f"{model_name(report.model)} {found} to {form(report)}: the file takes {percent(share)} of the dense one"
    corpus = corpus_on_top(report)
    before, now = report.dense["perplexity"].get(corpus or ""), _now(report).get(corpus or "")
    if corpus is None or before is None or now is None:
        return f"{text}."
    if not (math.isfinite(before) and math.isfinite(now)):
        return f"{text}, and perplexity on {model_name(corpus)} goes from {number(before)} to {number(now)}."
    change = now / before - 1
    way = "rises" if change > 0 else "falls"
    return f"{text}, and perplexity on {model_name(corpus)} {way} by {percent(abs(change))}."


def tiles(report: Report) -> list[Tile]:
    """Perplexity, size, bits and time."""
    return [_perplexity(report), _size(report), _bits(report), _time(report)]


def _perplexity(report: Report) -> Tile:
    corpus = corpus_on_top(report)
    if corpus is None:
        return Tile("Perplexity", UNKNOWN, "not measured")
    before, now = report.dense["perplexity"].get(corpus), _now(report)[corpus]
    about = f"on {model_name(corpus)}, dense → {'fine-tuned' if report.finetuning else 'compressed'}"
    found = None if report.finetuning else report.agreement.get(corpus)
    if found and found.loss_difference_stderr is not None and math.isfinite(now):
        about += f"; ± {number(now * found.loss_difference_stderr)} (paired)"
    elif report.finetuning:
        about += f"; {number(report.finetuning['perplexity']['before'].get(corpus))} before fine-tuning"
    if corpus in _in_domain(report):
        about += f"; {FLATTERS.format('training or calibration' if report.finetuning else 'calibration')}"
    return Tile("Perplexity", f"{number(before)} → {number(now)}", about)


def _size(report: Report) -> Tile:
    sizes = report.bytes
    share = percent(sizes["compressed"] / max(sizes["dense"], 1))
    return Tile("Whole file", size(sizes["compressed"]), f"{share} of {size(sizes['dense'])}")


def _bits(report: Report) -> Tile:
    dense = report.bits_per_weight * report.bytes["linears_dense"] / max(report.bytes["linears_compressed"], 1)
    weights = f"{number(report.bits_per_weight)} a compressed weight, {number(dense)} before"
    if not report.parameters:
        return Tile("Bits", number(report.bits_per_weight), weights)
    return Tile("Bits a parameter", number(report.bits_per_parameter), weights)


def _time(report: Report) -> Tile:
    record = report.finetuning.get("machine", report.machine) if report.finetuning else report.machine
    where = str(record.get("accelerator") or record.get("cpu") or record.get("system") or "an unknown machine")
    if not record.get("accelerator") and record.get("threads"):
        where += f", {record['threads']} thread{'s' if record['threads'] > 1 else ''}"
    if report.finetuning:
        return Tile("Time of fine-tuning", duration(report.finetuning.get("seconds")), f"on {where}")
    spent = report.seconds.get("total", 0.0) - report.seconds.get("evaluate", 0.0)
    return Tile("Time", duration(spent), f"without evaluation, on {where}")
