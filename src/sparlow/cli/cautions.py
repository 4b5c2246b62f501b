"""Every warning of a run with its cause and what to do; docs/warnings.md is written from it.

python -m sparlow.cli.cautions > docs/warnings.md
"""

from typing import NamedTuple

INTRODUCTION = """# Warnings

Written by `make docs-options` from the list in the code. Do not edit it by hand.

A run that warns goes on, and its result can be used. Warnings stand in the terminal's summary, on the report page, and
in `report.json` under `warnings`. An ellipsis stands for what only the run knows.
"""


class Caution(NamedTuple):
    """A warning.

    Attributes:
        when: The part of a run that it belongs to.
        says: Its text, … for what differs.
        cause: How it comes about.
        remedy: What to do, if anything.
    """

    when: str
    says: str
    cause: str
    remedy: str


OPENING, PLANNING, RUNNING, LAYER, ENDING, RESULT = (
    "The model is opened",
    "What layers keep",
    "A run goes on",
    "A layer is solved",
    "A run ends",
    "A result is opened or saved",
)
CAUTIONS = (
    Caution(
        OPENING,
        "The whole model was held in memory, because ….",
        "Blocks are read one at a time only from plain safetensors files whose names transformers knows.",
        "None is needed if memory suffices. Else save the model anew with save_pretrained of transformers.",
    ),
    Caution(
        OPENING,
        "… stored as float32, but …",
        "The files hold float32, and config.json asks for a type of half the size.",
        "Add --dtype float32 to keep what is stored.",
    ),
    Caution(
        OPENING,
        "… are not part of the result, because the model's class has no place for them: ….",
        "The checkpoint has more than its language model, such as a vision part or heads for several tokens.",
        "None, if the text part is what you want. Keep the original for the rest.",
    ),
    Caution(
        OPENING,
        "It is unknown whether the model's class lacks tensors of the checkpoint.",
        "The files could not be listed, or hold names that this transformers does not map.",
        "Compare the number of parameters with the model's page.",
    ),
    Caution(
        OPENING,
        "Files beside the model that are not copied: ….",
        "Only tokenizer, configuration, processor, chat template and licence files come along.",
        "Copy what you need into the result by hand.",
    ),
    Caution(
        OPENING,
        "The dense model is no better than chance on … (perplexity …). Check that tokenizer and weights "
        "belong together.",
        "Its perplexity exceeds the size of the vocabulary: another tokenizer, damaged weights, or text it "
        "cannot read.",
        "Evaluate the dense model by itself on ordinary text first.",
    ),
    Caution(
        PLANNING,
        "Of … layers …, because … does not divide their inputs.",
        "The default pattern 16:32 needs inputs in groups of 32, so a smaller group is taken.",
        "None. Give --pattern to decide for all layers.",
    ),
    Caution(
        PLANNING,
        "… of … layers have a rank from … to … and not the default of …, which is too large for them.",
        "With the default rank these small layers would take more than dense ones.",
        "None. Give --rank to decide for all layers.",
    ),
    Caution(
        PLANNING,
        "… of … layers take more than dense, the most … with …. Give them a lower rank or a sparser pattern, or leave "
        "them out with --ignore.",
        "A pattern, a rank or values that were asked for cost more than they save in these layers.",
        "As it says; `sparlow plan` shows the bytes of every kind of layer.",
    ),
    Caution(
        PLANNING,
        "… processes train on … windows in each step, not on ….",
        "Each process has at least one window in a step of matching.",
        "Start fewer processes for the same training as on one.",
    ),
    Caution(
        RUNNING,
        "The shard of block … was damaged after it was written. The block was compressed again.",
        "A file of an unfinished run was changed or cut, as by a full disk or a copy that broke off.",
        "None for this result. Look at the disk if it happens again.",
    ),
    Caution(
        RUNNING,
        "This run was resumed on a machine that differs (…), so its bits may differ from those of a run that "
        "never stopped.",
        "Kernels and sums depend on processor, threads and versions.",
        "None, unless bits must be reproduced: then repeat the whole run on one machine.",
    ),
    Caution(
        LAYER,
        "No calibration token reached this layer, so it was compressed without data of its own.",
        "An expert that the text does not need, or a layer that is never called.",
        "Give more or other text (--samples, --calibration), or leave the layer dense with --ignore.",
    ),
    Caution(
        LAYER,
        "A factorisation needed … of extra damping.",
        "Inputs of the layer depend on each other nearly exactly, as with little text.",
        "Give more text, or raise --damping.",
    ),
    Caution(
        LAYER,
        "… input features were always zero, so their weights were dropped.",
        "The calibration text never used these inputs.",
        "None if few. If many, give more varied text.",
    ),
    Caution(
        LAYER,
        "The solver had not settled after … iterations.",
        "The budget of steps ended before the result stood still.",
        "Raise --option effort or max_steps if the layer's relative error stands out.",
    ),
    Caution(
        LAYER,
        "The layers of this block were not compressed behind each other, because ….",
        "--behind layers needs to see which layer reads what, and this block does not show it.",
        "None: the block was compressed in the published order.",
    ),
    Caution(
        ENDING,
        "… comes from the same source as the … text, so its perplexity flatters the result. Measure on another text "
        "too, such as --evaluate novel.",
        "Calibration and evaluation read the same corpus or file.",
        "As it says.",
    ),
    Caution(
        ENDING,
        "… chats are longer than … tokens, and were cut there.",
        "Fine-tuning reads the first --block-size tokens of a chat.",
        "Raise --block-size if their ends matter.",
    ),
    Caution(
        ENDING,
        "… chats have no answer within their first … tokens, and were left out.",
        "A record without a message of the assistant, or with a question longer than --block-size.",
        "Raise --block-size, or look at the records.",
    ),
    Caution(
        ENDING,
        "The agreement with the dense model on … is not known, for its head was changed in memory.",
        "The dense model's head is needed beside the result's, and is gone once it was rounded in place.",
        "Give out= a directory, so that the dense weights stay on disk.",
    ),
    Caution(
        ENDING,
        "…: raise --match-lr, or give --dtype float32",
        "Training moved weights by less than their type can tell apart, so rounding undid it.",
        "As it says.",
    ),
    Caution(
        RESULT,
        "sparlow cannot teach this version of transformers to open compressed models (…). Install a version "
        "that sparlow "
        "supports, see its requirements.",
        "transformers renamed something that the format needs.",
        "Install transformers 5.16 to 5.24.",
    ),
    Caution(
        RESULT,
        "The model is opened merged, not packed. …",
        "This machine has no kernel for a layer of the model, or the file cannot be mapped.",
        "None: the numbers are the same, and more memory is taken.",
    ),
    Caution(
        RESULT,
        "… has been replaced, so it is stored in the model's own type.",
        "A module whose values lay on a grid was exchanged before saving.",
        "Compress anew if it shall be small.",
    ),
    Caution(
        RESULT,
        "…. They are stored in the model's own type.",
        "Training or editing moved values of S off their grid.",
        "Use `sparlow finetune` or --match, which keep grids.",
    ),
    Caution(
        RESULT,
        "The algorithms of the installed package … are missing, because importing it failed (…). Upgrade or "
        "uninstall it.",
        "A package declares algorithms under the entry point sparlow.algorithms, and does not import.",
        "As it says.",
    ),
)


def page() -> str:
    """The whole page in Markdown."""
    parts = [INTRODUCTION]
    for when in dict.fromkeys(caution.when for caution in CAUTIONS):
        rows = [c for c in CAUTIONS if c.when == when]
        texts = [f"**{c.says}**\n\n{c.cause} *What to do:* {c.remedy}\n" for c in rows]
        parts += [f"## {when}\n", *texts]
    return "\n".join(parts)


if __name__ == "__main__":
    print(page(), end="")  # noqa: T201 - the page itself
