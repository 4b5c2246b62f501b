"""The frame of the command line: how a function becomes a command, and how help and errors are shown."""

import functools
import logging
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NoReturn

import typer
from rich.markup import escape
from typer.core import TyperCommand

from sparlow.cli import ahead, display, waiting
from sparlow.cli.examples import epilog
from sparlow.cli.leaving import alone, leave, tell_others
from sparlow.cli.options import expanded
from sparlow.cli.signals import INTERRUPTED, noted
from sparlow.errors import TO_RUN, InputError, RunError, is_out_of_memory, out_of_memory
from sparlow.runtime.options import FEWER
from sparlow.schema import unknown

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Compress pretrained language models into sparse plus low-rank form.",
)
UsageError: Any = typer.BadParameter.__mro__[1]  # what typer raises for a command line that it cannot read


def run(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exit with 0 (done), 1 (the run failed), 2 (bad usage or input) or 130 (Ctrl-C)."""
    arguments, words = _everywhere(list(sys.argv[1:] if arguments is None else arguments))
    debug = "--debug" in words
    display.silent, display.verbose = "--quiet" in words, "--verbose" in words
    # a level lets its messages and bars through, see sparlow.evaluation.tasks
    logging.getLogger("lm_eval").setLevel(logging.WARNING if debug else logging.NOTSET)
    if _show_help(arguments):
        sys.exit(0)
    came: list[int] = []
    try:
        with noted(came), waiting.ended():
            code = app(arguments, prog_name="sparlow", standalone_mode=False)
    except UsageError as error:
        _fail_usage(error, arguments)
    except SystemExit as error:  # as typer ends after Ctrl-C
        code = error.code
    except Exception as error:
        if came and not debug:  # compiled code that is interrupted may raise something of its own
            leave(INTERRUPTED)
        if not debug and _is_foreseen(error):
            command = arguments[0] if arguments else ""
            _fail(*_said(error, command), shared=command == ahead.SHARED)
        if alone():
            raise
        traceback.print_exc()
        code = 1
    leave(code if isinstance(code, int) else 0)


OTHERWISE = {  # what an option is called in other commands, in former versions or by peers, and what it is called here
    "--perplexity": "--evaluate",
    "--dataset": "--calibration",
    "--calibration": "--dataset",
    "--block-size": "--seqlen",
    "--seqlen": "--block-size",
    "--nsamples": "--samples",
    "--data": "--dataset",
    "--max-new-tokens": "--max-tokens",
}
ELSEWHERE = {"verify": "inspect DIRECTORY --verify", "quantize": "compress", "prune": "compress"}  # commands of peers
EVERYWHERE = {"--debug": "--debug", "--quiet": "--quiet", "-q": "--quiet", "--verbose": "--verbose", "-v": "--verbose"}


LESS_MEMORY = {  # with what a command needs less
    "compress": TO_RUN,
    "compare": TO_RUN,
    "evaluate": "Reduce --seqlen, with --tasks also --batch-size, or choose another --device.",
    "finetune": "Reduce --batch or --block-size, or choose another --device. The same command resumes.",
    "generate": "Open a compressed model with --mode packed, write a shorter --prompt, or reduce --max-tokens.",
    "benchmark": FEWER,
}
MORE_MEMORY = "Close other programs, or repeat the command on a machine with more."


def _everywhere(arguments: list[str]) -> tuple[list[str], set[str]]:
    """Take out what may stand before the command or after it; return the rest, and what was there."""
    words = {EVERYWHERE[argument] for argument in arguments if argument in EVERYWHERE}
    if {"--quiet", "--verbose"} <= words:
        _fail("--quiet and --verbose contradict each other. Give one.", 2)
    rest = [argument for argument in arguments if argument not in EVERYWHERE]
    for i in reversed([i for i in range(len(rest)) if _is_bare(rest, i)]):  # without a file it means standard output
        rest.insert(i + 1, "-")
    return rest, words


def _is_bare(arguments: Sequence[str], i: int) -> bool:
    """Whether --json stands at a place without a file behind it."""
    return arguments[i] == "--json" and (i + 1 == len(arguments) or arguments[i + 1].startswith("--"))


def _show_help(arguments: Sequence[str]) -> bool:
    """Show the help of a command if that is asked for; typer would first import pydantic to read the other options."""
    context = _context(arguments)
    if context is None or not {"-h", "--help"}.intersection(arguments):
        return False
    text = context.get_help()
    display.out.print(text, end="" if not text else "\n", markup=False, highlight=False)  # rich has printed it, or not
    return True


def _context(arguments: Sequence[str]) -> Any:  # noqa: ANN401 - of a class that typer does not export
    """Return the context of the command that was typed, which knows its usage and its help; None if there is none."""
    group: Any = typer.main.get_command(app)
    found = group.commands.get(arguments[0]) if arguments else None
    if found is None:
        return None
    above = group.context_class(group, info_name="sparlow", **group.context_settings)
    return found.context_class(found, info_name=found.name, parent=above)


def _is_foreseen(error: Exception) -> bool:
    return isinstance(error, InputError | RunError | OSError) or is_out_of_memory(error)


def _said(error: Exception, name: str) -> tuple[str, int]:
    """What to tell of an error of a command, and the exit code."""
    if is_out_of_memory(error):
        return out_of_memory(error, advice=LESS_MEMORY.get(name, MORE_MEMORY)), 1
    return str(error), 2 if isinstance(error, InputError) else 1


def _fail(message: str, code: int, *, shared: bool = False) -> NoReturn:
    display.err.print(f"[red]error:[/] {escape(message)}", highlight=False)
    if shared:
        tell_others(message)
    leave(code)


def _fail_usage(error: Any, arguments: Sequence[str]) -> NoReturn:  # noqa: ANN401 - of a class that typer does not export
    if type(error).__name__ != "NoArgsIsHelpError":  # making that one has printed the help
        message, context = error.format_message(), error.ctx or _context(arguments)
        message = _named_otherwise(error, context) or _plain(message)
        command = context.command_path if context else "sparlow"
        usage = context.get_usage() if context else f"Usage: {command} COMMAND"
        display.err.print(f"[red]error:[/] {escape(message)}", highlight=False)
        display.err.print(f"{usage}\n`{command} --help` lists the options.", markup=False, highlight=False)
    sys.exit(2)


def _named_otherwise(error: Any, context: Any) -> str:  # noqa: ANN401 - of classes that typer does not export
    """Return the sentence for an option that has another name in this command; an empty one if it has none."""
    asked = getattr(error, "option_name", "")
    name = OTHERWISE.get(asked, "")
    known = {word for option in (context.command.params if context else ()) for word in option.opts}
    return f"{asked} is called {name} in {context.command_path}. Write that." if name in known else ""


USAGE = (  # what typer says, and what is wrong and what to do in our words
    (r"Got unexpected extra argument(?:s|\(s\))? \((.*)\)", r"More arguments than it takes: \1. Leave them out."),
    (r"Missing option '(.*)'\.", r"The option \1 is missing. Add it."),
    (r"Option '(.*)' requires an argument\.", r"The option \1 has no value. Write one behind it."),
    (r"Missing argument '(.*)'\.", r"\1 is missing. Name it."),
    (r"No such option: (\S+) \(Possible options: (.*)\)", r"There is no option \1; did you mean one of these: \2?"),
    (r"No such option: (\S+) Did you mean (\S+)\?", r"There is no option \1; did you mean \2?"),
    (r"No such option: (\S+)", r"There is no option \1."),
)


def _commands() -> list[str]:
    group: Any = typer.main.get_command(app)
    return [*group.commands]


def _plain(message: str) -> str:
    """Say in our words what typer says of a command line that it cannot read."""
    command = re.match(r"No such command '(.*?)'", message, flags=re.DOTALL)
    if command:
        if command[1] in ELSEWHERE:
            return f"There is no command {command[1]!r}. Write sparlow {ELSEWHERE[command[1]]}."
        return unknown(f"There is no command {command[1]!r}", command[1], _commands())
    for theirs, ours in USAGE:
        if re.fullmatch(theirs, message, flags=re.DOTALL):
            return re.sub(theirs, ours, message, flags=re.DOTALL)
    for kind, words in (("integer", "a whole number"), ("number", "a number"), ("boolean", "true or false")):
        message = re.sub(rf"Input should be a valid {kind}.*", f"It must be {words}.", message, flags=re.DOTALL)
    return message


def _show_version(asked: bool) -> None:
    if asked:
        from sparlow.version import own_version

        display.out.print(f"sparlow {own_version()}", highlight=False)
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show errors only, and what --json - asks for.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show a line for every layer, and all warnings.")
    ] = False,
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Show the traceback of an error. Like the two before, it may stand anywhere."),
    ] = False,
) -> None:
    del version, quiet, verbose, debug  # the callback of one and ``main`` have done all


class _Command(TyperCommand):
    """A command whose usage names an argument as its help does, without the braces of typer: MODEL."""

    def get_usage(self, ctx: Any) -> str:  # noqa: ANN401 - of a class that typer does not export
        return re.sub(r"\{([A-Z]+)\}", r"\1", super().get_usage(ctx))


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Make a command of a function, with the options that ``expanded`` gives it."""
    name = function.__name__
    return app.command(cls=_Command, epilog=epilog(name))(expanded(function, functools.partial(ahead.prepare, name)))
