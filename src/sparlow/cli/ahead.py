"""What a command checks first, by what was typed alone: names and places. Torch, which takes seconds, comes after."""

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from sparlow.cli import display, pages, results, waiting
from sparlow.cli.leaving import alone, speaks
from sparlow.model.artefact.registration import when_imported
from sparlow.model.loading.place import require_place, require_result

SHARED = "compress"  # the command that several processes may share
WRITING_RUNS = ("compress", "finetune")  # commands whose --out is one run of sparlow


def prepare(command: str, values: Mapping[str, Any]) -> None:
    """Check the places that a command reads and writes, and quieten what is not to be heard.

    Args:
        command: Its name.
        values: Of its parameters, by name.

    Raises:
        InputError: A place is not there, or in use.
    """
    several = not alone()  # as torchrun says
    if several and command != SHARED:
        from sparlow.distributed import require_one

        require_one(f"sparlow {command}")
    first = speaks()
    file = values.get("json_file")
    display.out.quiet = display.silent or not first or file == results.STANDARD_OUTPUT
    quieten_libraries()
    results.require_place(file)
    pages.require_places(values.get("html_file"), values.get("figures"))
    if values.get("directory") is not None:
        require_result(values["directory"])
    if command in WRITING_RUNS and not several:  # another one may be writing there already
        from sparlow.run.output_dir import check_folder

        check_folder(values["out"], overwrite=values["overwrite"])
    for name in _models(values):
        require_place(name, ask=first)
    if first and not display.silent:
        waiting.begin(display.err)


def _models(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield the models that a command reads."""
    yield from (name for name in (values.get("model"), values.get("baseline")) if name is not None)
    yield from values.get("models") or ()


def quieten_libraries() -> None:
    """Keep the libraries' own bars and notices out of ours, as soon as each is imported, if it is."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # for their developers
    when_imported("transformers.utils.logging", _quieten_transformers)
    when_imported("datasets.utils", _quieten_datasets)


def _quieten_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _quieten_datasets() -> None:
    from datasets.utils import disable_progress_bars

    disable_progress_bars()
