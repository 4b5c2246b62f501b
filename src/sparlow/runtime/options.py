"""What ``sparlow generate`` and ``sparlow benchmark`` are asked for. None of this imports torch."""

import os
from dataclasses import dataclass
from typing import Annotated

from sparlow.errors import InputError
from sparlow.schema import NOT_NEGATIVE, Choices, Doc, Panel, Unset, at_least, check_fields, unknown

MODES = ("dense", "packed", "merged", "auto")
ACTIVATIONS = ("float", "int8")
ACTIVATIONS_VARIABLE = "SPARLOW_ACTIVATIONS"
STEPS = ("transformers", "kernel")
DTYPES = ("float32", "bfloat16", "float16")
FEWER = "Measure fewer models at once, or reduce --batch or --prompt-tokens."  # then a benchmark takes less memory
TEXT, MACHINE, MEASURED = Panel("Text"), Panel("Machine"), Panel("Measured")


def activations_of(mode: str) -> str:
    """Return the type of the inputs of packed layers where nobody has said: what serves best, in mode auto.

    Raises:
        InputError: ``SPARLOW_ACTIVATIONS`` asks for a type that does not exist.
    """
    asked = os.environ.get(ACTIVATIONS_VARIABLE) or ("int8" if mode == "auto" else "float")
    if asked not in ACTIVATIONS:
        raise InputError(unknown(f"{ACTIVATIONS_VARIABLE} cannot be {asked!r}", asked, ACTIVATIONS))
    return asked


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
        Doc("Type of the inputs of packed layers whose levels are integers; int8 is quicker and less exact."),
        Choices("activations", ACTIVATIONS),
        Unset("SPARLOW_ACTIVATIONS, or int8 in mode auto, else float"),
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
        Doc("At 0 the likeliest token is taken; above, tokens are drawn, the more freely the higher."),
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


@dataclass(frozen=True)
class BenchmarkOptions:
    """What is measured, side by side."""

    mode: Annotated[
        tuple[str, ...],
        Doc("Modes of compressed models: packed, merged or dense, in each --dtype."),
        MEASURED,
    ] = ("packed",)
    dtype: Annotated[tuple[str, ...], Doc("Data types to compute in: float32, bfloat16 or float16."), MEASURED] = (
        "float32",
        "bfloat16",
    )
    step: Annotated[
        tuple[str, ...], Doc("What computes the tokens behind the prompt: kernel or transformers."), MEASURED
    ] = STEPS
    activations: Annotated[
        tuple[str, ...],
        Doc("Types of the inputs of packed layers whose levels are integers: float or int8."),
        MEASURED,
    ] = ACTIVATIONS
    batch: Annotated[tuple[str, ...], Doc("Texts that are written at once."), MEASURED] = ("1",)
    prompt_tokens: Annotated[int, Doc("Tokens of each prompt, drawn at random."), at_least(2), MEASURED] = 512
    tokens: Annotated[int, Doc("Tokens that are written behind it."), at_least(2), MEASURED] = 64
    repeats: Annotated[int, Doc("Runs of each, in turns; the median counts."), at_least(1), MEASURED] = 5
    threads: Annotated[
        int | None, Doc("Threads of torch and of the kernel."), Unset("torch's own number"), at_least(1), MACHINE
    ] = None
    trust_remote_code: Annotated[bool, Doc("Run Python code that comes with the model."), MACHINE] = False

    def __post_init__(self) -> None:
        """Check every field."""
        check_fields(self, "the options of benchmark")
        known = {"mode": MODES[:3], "dtype": DTYPES, "step": STEPS, "activations": ACTIVATIONS, "batch": None}
        for name, words in known.items():
            given = getattr(self, name)
            if not given:
                raise InputError(f"There is nothing to measure without --{name}. Give one, or leave it out.")
            for word in given:
                if words and word not in words:
                    raise InputError(unknown(f"There is no {name} {word!r} to measure", word, words))
        if not all(text.isascii() and text.isdigit() and int(text) for text in self.batch):
            raise InputError(f"--batch must be whole numbers of at least 1, not {', '.join(self.batch)}.")

    @property
    def batches(self) -> list[int]:
        """The numbers of texts."""
        return [int(text) for text in self.batch]
