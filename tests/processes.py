"""Processes with a command line of sparlow.

Interpreter, torch and transformers take seconds to start, so a server that has imported everything and computed
nothing forks a process for every run (``multiprocessing``'s forkserver). Each is a whole run of the command line.
"""

import multiprocessing
import os
import signal
import socket
import time
from contextlib import contextmanager

SERVER = multiprocessing.get_context("forkserver")
WHAT_COMMANDS_IMPORT = (
    "sparlow.run.compress",
    "sparlow.run.compare",
    "sparlow.planning.plan",
    "sparlow.finetuning.job",
)
SERVER.set_forkserver_preload(
    ["sparlow.cli.commands", *WHAT_COMMANDS_IMPORT, "datasets", "transformers.models.llama.modeling_llama"]
)
PATIENCE = 600  # seconds after which a run counts as hanging


def together(size):
    """What the environment of each of ``size`` processes of one run holds, as torchrun sets it."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    shared = {"WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    everyone = [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in range(size)]
    return [{name: str(value) for name, value in variables.items()} for variables in everyone]


def join(variables):
    """Be one of several: the ``prepare`` of a ``Run``."""
    os.environ |= variables


class Run:
    """One process with a command line of sparlow.

    Args:
        arguments: After ``sparlow``.
        log: File for what it prints, and a line ``solved BLOCK`` for every layer that is finished.
        prepare: Called in the process with ``argument`` before anything else.
    """

    def __init__(self, arguments, log, prepare=None, argument=None):
        self.log = log
        self.process = SERVER.Process(target=_run, args=([*map(str, arguments)], log, prepare, argument))
        self.start = time.perf_counter()
        self.process.start()

    def end(self, patience=PATIENCE):
        """Wait for it; its exit code, or minus the signal that killed it."""
        self.process.join(patience)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"hangs: {self.log.read_text()}")
        self.seconds = time.perf_counter() - self.start
        return self.process.exitcode

    @property
    def said(self):
        return self.log.read_text() if self.log.exists() else ""

    @property
    def solved(self):
        """The blocks of which at least one layer was solved."""
        return {int(line.split()[1]) for line in self.said.splitlines() if line.startswith("solved ")}


def _run(arguments, log, prepare, argument):
    """Be the process."""
    import torch

    from sparlow.cli import commands, display

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # multiprocessing ignores it
    torch.set_num_threads(1)

    @contextmanager
    def progress():
        def notify(step):
            if step.layer:
                os.write(1, f"solved {step.layer.block}\n".encode())
            if step.stage == "fine-tuning":
                os.write(1, f"step {step.done}\n".encode())

        yield notify

    display.progress = progress
    if prepare:
        prepare(argument)
    commands.main(arguments)
