"""How a run is done, beside what the recipe says is done: none of it decides what the result holds."""

from collections.abc import Sequence
from dataclasses import dataclass

from sparlow.errors import InputError


@dataclass(frozen=True)
class RunOptions:
    """How to run, and on what to measure.

    Attributes:
        device: "auto" (an accelerator if there is one), or torch's name of a device.
        offload: Where to keep block inputs between blocks: "cpu", "disk", or "auto" for the fastest that fits.
        evaluate: Corpora or files on which perplexity is measured.
        evaluate_seqlen: Tokens in a window of these; the recipe's seqlen if None.
        limit: At most so many windows of each of these; all if None.
        trust_remote_code: Let a model bring Python code of its own.
    """

    device: str = "auto"
    offload: str = "auto"
    evaluate: tuple[str, ...] = ("builtin",)
    evaluate_seqlen: int | None = None
    limit: int | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Take any sequence of names."""
        object.__setattr__(self, "evaluate", listed(self.evaluate))


def listed(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names of corpora; InputError for a text, which Python takes for a sequence of letters."""
    if isinstance(names, str):
        raise InputError(f"The corpora to evaluate on are given as the text {names!r}. Give a list: [{names!r}].")
    return tuple(names)


DEFAULT = RunOptions()
