"""How a run is done. Unlike the recipe, none of these options changes the result."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from sparlow.errors import InputError
from sparlow.schema import Choices, Doc, Panel, Unset, at_least, check_fields, documented, shown

EVALUATION, MACHINE = Panel("Evaluation"), Panel("Machine")


@documented
@dataclass(frozen=True)
class RunOptions:
    """How to run, and on what to measure."""

    device: Annotated[
        str,
        Doc(
            "Device to compute on: auto (an accelerator if there is one), cpu, cuda, cuda:1, mps or another of torch's."
        ),
        MACHINE,
    ] = "auto"
    offload: Annotated[
        str,
        Doc(
            "Where to keep block inputs between blocks: cpu, disk, or auto (the fastest that fits; with --match the "
            "disk, unless an accelerator has room)."
        ),
        Choices("place for block inputs", ("auto", "cpu", "disk")),
        MACHINE,
    ] = "auto"
    evaluate: Annotated[
        tuple[str, ...],
        Doc(
            "Corpora or files to measure perplexity on. FILE#601-800 stands for records 601 to 800 of a table. An "
            'empty "" stands for none.'
        ),
        EVALUATION,
    ] = ("builtin",)
    evaluate_seqlen: Annotated[
        int | None, Doc("Tokens in each window of these texts."), Unset("the recipe's seqlen"), at_least(1), EVALUATION
    ] = None
    limit: Annotated[
        int | None,
        Doc("Maximum number of windows taken from each of these texts."),
        Unset("all"),
        at_least(1),
        EVALUATION,
    ] = None
    trust_remote_code: Annotated[bool, Doc("Run Python code that comes with the model."), MACHINE] = False

    def __post_init__(self) -> None:
        """Check every field, and take any sequence of names."""
        object.__setattr__(self, "evaluate", listed(self.evaluate))
        check_fields(self, "the run options")
        for name in ("limit", "evaluate_seqlen"):
            if getattr(self, name) is not None and not self.evaluate:
                option = f"--{name.replace('_', '-')}"
                raise InputError(f"{option} has no effect without --evaluate. Name a text to measure, or leave it out.")


def listed(names: str | Sequence[str | Path]) -> tuple[str, ...]:
    """Return the names of corpora: none for an empty text, and one name, which Python takes for letters, as one.

    Raises:
        InputError: They are no names.
    """
    given = (names,) if isinstance(names, str) else tuple(names) if isinstance(names, Iterable) else (names,)
    wrong = next((name for name in given if not isinstance(name, str | Path)), None)
    if wrong is not None or None in given:
        raise InputError(f"A corpus to evaluate on cannot be given as {shown(wrong)}. Give names of corpora or files.")
    return tuple(str(name) for name in given if name != "")


DEFAULT = RunOptions()
