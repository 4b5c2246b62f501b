"""Which perplexities are shown, and what stands beside them. Those with BOS are shown where they differ enough."""

from collections.abc import Iterable, Mapping, Sequence

from sparlow.report.records import Agreement
from sparlow.text import WITH_BOS

DIFFERENCE = 0.02  # between the published protocol and windows that begin with BOS, from which both are shown
FLATTERS = "in-domain: same source as the {} text"


def shown(measured: Sequence[Mapping[str, float]]) -> list[str]:
    """The names of the texts to show, in order.

    Args:
        measured: Perplexities by name, of one model each, all with the same names.
    """

    def differs(name: str) -> bool:
        plain = name.removesuffix(WITH_BOS)
        return any(
            name in each and plain in each and not abs(each[name] / each[plain] - 1) <= DIFFERENCE for each in measured
        )

    names = dict.fromkeys(name for each in measured for name in each)
    return [name for name in names if not name.endswith(WITH_BOS) or differs(name)]


def labelled(name: str, in_domain: Iterable[str], what: str = "calibration") -> str:
    """A name as the line of a table shows it, with a remark if the text is of the source that ``what`` names."""
    return f"perplexity, {name}" + (f" ({FLATTERS.format(what)})" if name in in_domain else "")


def agreement_rows(name: str, found: Agreement | None) -> list[tuple[str, str]]:
    """Lines of a table on how far a model agrees with the dense one on a text: what, and the figure with its error."""
    if found is None:
        return [(f"divergence from the dense model, {name}", "–")]
    return [
        (f"divergence from the dense model, {name}", with_error(found.divergence, found.divergence_stderr)),
        (f"same first choice, {name}", "–" if found.same_first_choice is None else f"{found.same_first_choice:.1%}"),
        (f"difference of losses, {name}", with_error(found.loss_difference, found.loss_difference_stderr, "+")),
    ]


def with_error(value: float | None, stderr: float | None, sign: str = "") -> str:
    """A figure in nats a token, with its standard error where that is known."""
    if value is None:
        return "–"
    return f"{value:{sign}.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")
