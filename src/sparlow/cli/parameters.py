"""Parameters of commands that no class of options declares: where to read and write, and what serves one command."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Model to read: a hub id, a directory, or a .gguf file.", show_default=False),
]
Models = Annotated[
    list[str],
    typer.Argument(metavar="MODELS", help="Models to read: hub ids, directories, or .gguf files.", show_default=False),
]
Prompt = Annotated[str, typer.Option(metavar="TEXT", rich_help_panel="Text", help="Text to go on from.")]
DirectoryOrNone = Annotated[
    Path | None, typer.Argument(metavar="DIRECTORY", help="A directory that sparlow wrote.", show_default=False)
]
Directory = Annotated[
    Path, typer.Argument(metavar="DIRECTORY", help="A directory that sparlow wrote.", show_default=False)
]
Out = Annotated[
    Path,
    typer.Option(
        metavar="DIRECTORY", rich_help_panel="Output", help="Directory to write. An unfinished one is resumed."
    ),
]
JsonFile = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="FILE",
        rich_help_panel="Output",
        help="Also write the result to this file; without a file it is printed alone.",
    ),
]
Required = Annotated[
    list[str] | None,
    typer.Option(
        "--require",
        metavar="FIGURE<=BOUND",
        rich_help_panel="Evaluation",
        help=escape(
            "Exit with 1 if the result misses this: perplexity<=+10% (above the dense model's), perplexity<=12.5, "
            "bits<=4.6, bytes<=300MB, relative_error<=0.01. Repeat it for several."
        ),
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", rich_help_panel="Output", help="Replace a finished result in --out.")
]
OutOfPlan = Annotated[
    Path | None,
    typer.Option(
        metavar="DIRECTORY",
        rich_help_panel="Output",
        help="Directory that would be written, to see how much disk is free.",
    ),
]
Timed = Annotated[
    bool,
    typer.Option(
        "--time/--no-time", rich_help_panel="Output", help="Run the algorithm on small layers to predict the time."
    ),
]
OutOfComparison = Annotated[
    Path,
    typer.Option(
        metavar="DIRECTORY", rich_help_panel="Output", help="Directory to write. Finished methods in it are reused."
    ),
]
Plugins = Annotated[
    list[Path] | None,
    typer.Option("--plugin", metavar="FILE.py", help="Python file with algorithms of your own. Repeatable."),
]
Dtype = Annotated[
    str,
    typer.Option(
        rich_help_panel="Machine",
        metavar="TEXT",
        help="Data type of the model's weights: auto (as stored), float32, bfloat16 or float16.",
    ),
]
FormName = Annotated[
    str | None,
    typer.Option("--as", metavar="FORM", help="Form to write; --list shows all of them.", show_default=False),
]
OutOfExport = Annotated[
    Path | None,
    typer.Option(metavar="DIRECTORY", rich_help_panel="Output", help="Directory to write.", show_default=False),
]
OptionOfForm = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="An option of the form. Repeat it for several."),
]
ListForms = Annotated[
    bool, typer.Option("--list", help="Show what each form keeps and loses, which programs open it, and its options.")
]


@dataclass(frozen=True)
class TrainedOptions:
    """What ``sparlow finetune`` writes beside its result, and over what."""

    overwrite: Overwrite = False
    peft: Annotated[
        Path | None,
        typer.Option(
            "--peft",
            metavar="DIRECTORY",
            rich_help_panel="Output",
            help="Also write the adapter in PEFT's form to this directory, with the plain model of all S in base.",
        ),
    ] = None
