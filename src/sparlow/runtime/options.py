"""What ``sparlow generate`` and ``sparlow benchmark`` are asked for. None of this imports torch."""

from dataclasses import dataclass
from typing import Annotated

from sparlow.errors import InputError
from sparlow.schema import NOT_NEGATIVE, Choices, Doc, Panel, Unset, at_least, check_fields

MODES = ("dense", "packed", "merged", "auto")
ACTIVATIONS = ("float", "int8")
STEPS = ("transformers", "kernel")
DTYPES = ("float32", "bfloat16", "float16")
TEXT, MACHINE, MEASURED = Panel("Text"), Panel("Machine"), Panel("Measured")


@dataclass(frozen=True)
class RunningOptions:
    """How a model is opened to run it."""

    mode: Annotated[
        str | None,
        Doc("How the layers of a compressed model are held, see docs/running.md."),
        Choices("mode", MODES),
        Unset("SPARLOW_MODE, or auto"),
        MACHINE,
    ] = None
    activations: Annotated[
        str | None,
        Doc("int8 rounds the inputs of packed layers whose levels are integers: quicker and less exact."),
        Choices("activations", ACTIVATIONS),
        Unset("SPARLOW_ACTIVATIONS, or float"),
        MACHINE,
    ] = None
    step: Annotated[
        str,
        Doc(
            "What computes a token behind others: one call of the kernel, where it knows the model's structure, or "
            "transformers."
        ),
        Choices("step", STEPS),
        MACHINE,
    ] = "kernel"
    dtype: Annotated[
        str,
        Doc("Data type to compute in: auto (as stored; on the CPU float32), float32, bfloat16 or float16."),
        MACHINE,
    ] = "auto"
    trust_remote_code: Annotated[bool, Doc("Run Python code that comes with the model."), MACHINE] = False

    def __post_init__(self) -> None:
        """Check every field."""
        check_fields(self, "the options of generate")


@dataclass(frozen=True)
class TextOptions:
    """What text is wanted."""

    chat: Annotated[bool, Doc("Give the prompt as a user's message, by the model's chat template."), TEXT] = False
    max_tokens: Annotated[int, Doc("Maximum number of new tokens."), at_least(1), TEXT] = 256
    temperature: Annotated[
        float,
        Doc("0 takes the likeliest token; above, tokens are drawn, the more freely the higher."),
        NOT_NEGATIVE,
        TEXT,
    ] = 0.0
    top_p: Annotated[
        float | None,
        Doc("Draw from the likeliest tokens that together have this probability."),
        Unset("the model's own"),
        TEXT,
    ] = None
    seed: Annotated[int, Doc("Of the draws."), at_least(0), TEXT] = 0

    def __post_init__(self) -> None:
        """Check every field."""
        check_fields(self, "the options of generate")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"--top-p must be above 0 and at most 1, not {self.top_p:g}.")
        if self.top_p is not None and self.temperature == 0:
            raise InputError("--top-p has no effect without --temperature. Add it, or leave --top-p out.")
