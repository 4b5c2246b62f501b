"""``--require "perplexity<=+10%"``: what a result must keep to, for pipelines, where exit code 1 stops what follows."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from sparlow.errors import InputError, RunError
from sparlow.recipe.sizes import UNITS
from sparlow.schema import unknown

FIGURES = ("perplexity", "bits", "bytes", "relative_error")
_FORM = re.compile(
    r"\s*(?P<figure>[a-z_]+)\s*(?P<sign><=|<)\s*(?P<plus>\+?)(?P<number>\d{1,15}(?:\.\d{1,15})?)\s*(?P<unit>%|[a-z]*)\s*",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Requirement:
    """A bound on a figure of a result.

    Attributes:
        text: As typed.
        figure: One of ``FIGURES``.
        bound: Which it may reach; of a relative one, how many times the dense model's.
        relative: Whether it is a multiple of the dense model's figure.
        below: Whether it must stay below the bound.
    """

    text: str
    figure: str
    bound: float
    relative: bool
    below: bool

    def holds(self, found: float, dense: float | None) -> bool:
        """Whether a figure keeps to the bound; nothing that is no number does."""
        if self.relative and dense is None:
            return False
        bound = self.bound * dense if self.relative and dense is not None else self.bound
        return found < bound if self.below else found <= bound


def parse_requirement(text: str) -> Requirement:
    """Read ``perplexity<=+10%`` (of the dense model's), ``perplexity<=12.5``, ``bits<=4.6``, ``bytes<=300MB``.

    Raises:
        InputError: It is none of these.
    """
    found = _FORM.fullmatch(text)
    if found is None:
        raise InputError(
            f"--require {text} is not understood. Write a figure, <= or <, and a bound, such as perplexity<=+10%, "
            "bits<=4.6 or bytes<=300MB."
        )
    figure, unit, number = found["figure"].lower(), found["unit"].upper(), float(found["number"])
    if figure not in FIGURES:
        raise InputError(unknown(f"--require knows no figure {figure!r}", figure, FIGURES))
    relative = unit == "%"
    if relative and figure not in ("perplexity", "bytes"):
        raise InputError(f"--require {text} has no dense figure to be relative to. Give a number without %.")
    if unit and not relative and (figure != "bytes" or unit not in UNITS):
        raise InputError(f"--require {text} has a unit that is not understood. Only bytes have one, such as MB.")
    if found["plus"] and not relative:
        raise InputError(f"--require {text} adds to nothing. Write +10% for a tenth above the dense model.")
    bound = (number / 100 + (1 if found["plus"] else 0)) if relative else number * UNITS.get(unit, 1)
    return Requirement(text.strip(), figure, bound, relative, found["sign"] == "<")


def parse_requirements(texts: Sequence[str], *, measures_text: bool) -> list[Requirement]:
    """Read all of them before the work.

    Args:
        texts: As typed.
        measures_text: Whether perplexity will be known.

    Raises:
        InputError: One is wrong, or can never be seen to hold.
    """
    found = [parse_requirement(text) for text in texts]
    for one in found:
        if one.figure == "perplexity" and not measures_text:
            raise InputError(f"--require {one.text} needs a perplexity, and no text is measured. Name one to evaluate.")
    return found


def require_for_finetuning(asked: Sequence[Requirement], measured: Sequence[str], dense: Collection[str]) -> None:
    """Raise InputError, before the work, for what fine-tuning will not know.

    Args:
        asked: The requirements.
        measured: Texts that are measured before and after.
        dense: Those of which the dense model's perplexity is on record.
    """
    for one in asked:
        if one.figure == "relative_error":
            raise InputError(f"--require {one.text} is for compress. Fine-tuning does not measure the error of layers.")
        unknown = [name for name in measured if name not in dense]
        if one.figure == "perplexity" and one.relative and unknown:
            raise InputError(
                f"--require {one.text} is relative to the dense model, which compress did not measure on "
                f"{', '.join(unknown)}. Give a number, or --evaluate a text that compress measured."
            )


def require_only_perplexity(asked: Sequence[Requirement], *, relative: bool) -> None:
    """Raise InputError for what an evaluation does not know: anything but perplexity, and the dense model's if absent.

    Args:
        asked: The requirements.
        relative: Whether there is a dense model to be relative to.
    """
    for one in asked:
        if one.figure != "perplexity":
            raise InputError(f"--require {one.text} is for compress. An evaluation knows perplexity only.")
        if one.relative and not relative:
            raise InputError(f"--require {one.text} is relative to the dense model. Name that with --baseline.")


def require_all(
    asked: Sequence[Requirement],
    found: Mapping[str, Mapping[str, float]],
    dense: Mapping[str, Mapping[str, float]],
) -> None:
    """Raise RunError that names all figures that do not keep to what was asked for.

    Args:
        asked: The requirements.
        found: Figures of the result, each by text where it was measured on several, else under an empty name.
        dense: Those of the dense model.
    """
    missed = []
    for one in asked:
        for name, value in found.get(one.figure, {}).items():
            before = dense.get(one.figure, {}).get(name)
            if not one.holds(value, before):
                where = f" on {name}" if name else ""
                known = "not measured on these windows" if before is None else f"{before:,.6g}"
                beside = f" (dense {known})" if one.relative else ""
                missed.append(f"{one.figure}{where} is {value:,.6g}{beside}, and {one.text} was required")
    if missed:
        raise RunError(f"The result was written, and does not keep to what is required: {'; '.join(missed)}.")
