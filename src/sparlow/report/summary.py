"""What terminal and page both say of a run, in rows of a table and in a sentence."""

from sparlow.files import human_bytes
from sparlow.report.perplexities import agreement_rows, labelled, shown
from sparlow.report.records import Report
from sparlow.report.value_types import MODEL


def perplexities_of_finetuning(report: Report) -> list[tuple[str, str, str]]:
    """A row a corpus: name, before, after."""
    before, after = (report.finetuning["perplexity"][when] for when in ("before", "after"))
    same = report.finetuning.get("in_domain", ())
    return [
        (labelled(name, same, "training or calibration"), _perplexity(before[name]), _perplexity(after[name]))
        for name in shown([before, after])
    ]


def summary_head(report: Report) -> tuple[str, str, str]:
    """The titles of ``summary_rows``."""
    return "", "dense", "fine-tuned" if report.finetuning else "compressed"


def summary_rows(report: Report) -> list[tuple[str, str, str]]:
    """What the terminal and the page both show first: name, dense, and what the result is now."""
    dense = report.dense["perplexity"]
    now = report.finetuning["perplexity"]["after"] if report.finetuning else report.compressed["perplexity"]
    same = report.finetuning.get("in_domain", ()) if report.finetuning else report.in_domain
    rows = []
    for name in shown([dense, now]):
        rows.append((labelled(name, same), _perplexity(dense.get(name)), _perplexity(now.get(name))))
        if name in report.agreement and not report.finetuning:  # which it was measured before
            rows += [(what, "–", value) for what, value in agreement_rows(name, report.agreement[name])]
    sizes = report.bytes
    values = report.values
    rows.append(("values kept", f"{values['linears_dense']:,}", f"{values['linears_compressed']:,}"))
    rows.append(("type of these values", MODEL, report.value_types))
    rows.append(("linear layers", human_bytes(sizes["linears_dense"]), human_bytes(sizes["linears_compressed"])))
    rows.append(("whole model", human_bytes(sizes["dense"]), human_bytes(sizes["compressed"])))
    dense_bits = report.bits_per_weight * sizes["linears_dense"] / max(sizes["linears_compressed"], 1)
    rows.append(("bits a linear weight", f"{dense_bits:.2f}", f"{report.bits_per_weight:.2f}"))
    if report.parameters:
        whole = 8 * sizes["dense"] / report.parameters["model"]
        rows.append(("bits a parameter, whole file", f"{whole:.2f}", f"{report.bits_per_parameter:.2f}"))
        rows.append(("parameters of the blocks that are compressed", "–", f"{report.share_compressed:.1%}"))
    when = " before fine-tuning" if report.finetuning else ""
    rows.append((f"mean relative squared error{when}", "0", f"{report.mean_relative_error:.5f}"))
    per_token = report.mean_relative_error_per_token
    if per_token is not None:
        rows.append(("the same, each token by its own size", "0", f"{per_token:.5f}"))
    return rows


def remarks(report: Report) -> str:
    """Return one sentence on how many layers need a remark, and which."""
    said = {
        "extra_damping": "needed extra damping",
        "dead_inputs": "had dead inputs",
        "unsettled": "had not settled when the solver ended",
        "without_data": "saw no calibration token",
    }
    parts = [f"{report.counts[name]} {what}" for name, what in said.items() if report.counts.get(name)]
    return f"Of {len(report.layers)} layers {', '.join(parts) or 'none needs a remark'}."


def _perplexity(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
