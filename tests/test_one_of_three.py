"""One of three processes fails in every way: the others end soon with a sentence, and the same command goes on."""

import datetime as dt
import errno
import json
import os
import re
import signal
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from families import save_tiny
from processes import Run, join, together
from sparlow.errors import RunError

TEXT = "".join(chr(32 + (7 * i * i + i // 3) % 95) for i in range(900))
OPTIONS = ["--samples", "6", "--seqlen", "16", "--rank", "4", "--option", "effort=0.1", "--option", "max_steps=4"]
SOON = 60  # seconds that the others may take to end, on a busy machine
SHORT = dt.timedelta(seconds=5)  # to wait for one that hangs, in place of minutes


def fault(error):
    raise error


FAULTS = {
    "raises": lambda: fault(RunError("It has failed as it was told to.")),
    "breaks": lambda: fault(KeyError("a bug")),
    "disk full": lambda: fault(OSError(errno.ENOSPC, "No space left on device")),
    "exits": lambda: os._exit(7),
    "is killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "hangs": lambda: time.sleep(10 * SOON),
}


def disturbed(argument):
    """Be one of several, and fail in the second block: the ``prepare`` of a ``Run``."""
    variables, how, note = argument
    join(variables)
    from sparlow import distributed
    from sparlow.model.artefact import shards
    from sparlow.run import divided, job, pipeline

    def fail(*_, **__):
        note.write_text(str(time.time()))
        FAULTS[how]()

    compress_block, rank = job.compress_block, int(variables["RANK"])

    def with_fault(through, *args, **kwargs):
        if through.number == 1:
            distributed.MINUTES = SHORT
            if how == "disk full" and rank == 0:
                shards.save_file = fail
            elif how == "hangs" and rank == 2:
                pipeline.collect_statistics = fail
            elif how == "is killed" and rank == 1:
                divided.DividedRows.total = fail  # of a layer that all solve together
            elif how not in ("disk full", "hangs", "is killed") and rank == 1:
                pipeline.solve = fail
        return compress_block(through, *args, **kwargs)

    job.compress_block = with_fault


def started(model, out, prepare=join, how=None, note=None):
    text = model.parent / "text.txt"
    text.write_text(TEXT)
    command = ["compress", model, "--out", out, "--calibration", text, "--evaluate", text, *OPTIONS]
    found = []
    for variables in together(3):
        log = out.parent / f"{out.name}-{len(list(out.parent.glob('*.log')))}.log"
        log.touch()
        found.append(Run(command, log, prepare, variables if how is None else (variables, how, note)))
    return found


def shards_of(folder):
    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Of which one layer costs more than a third of a block, so that its rows are divided."""
    folder = tmp_path_factory.mktemp("three") / "model"
    config = save_tiny("llama", folder).config
    config.intermediate_size = 96
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(model):
    out = model.parent / "undisturbed"
    runs = started(model, out)
    assert [run.end() for run in runs] == [0, 0, 0], [run.said for run in runs]
    return shards_of(out)


CASES = {  # how: who, its exit code, and what it says
    "raises": (1, 1, "error: model.layers.1.", "failed as it was told to"),
    "breaks": (1, 1, "Traceback", "KeyError: 'a bug'"),
    "disk full": (0, 1, "error: ", "No space left on device"),
    "exits": (1, 7),
    "is killed": (1, -signal.SIGKILL),
    "hangs": (2, -signal.SIGKILL),
}


@pytest.mark.slow
def test_the_others_end_soon_and_the_run_goes_on(model, undisturbed, tmp_path, record_property):
    """One directory for all: each run goes on behind the block that was whole when the one before it ended."""
    out = tmp_path / "out"
    for how in CASES:
        note = tmp_path / how
        record_property(f"seconds until the others had ended: {how}", round(one_fails(how, model, out, note), 1))
        record = json.loads((out / "sparlow.json").read_text())
        assert (len(record["blocks"]), record["finished"]) == (1, False), how
    runs = started(model, out)
    assert [run.end() for run in runs] == [0, 0, 0], [run.said for run in runs]
    assert runs[0].solved == {1, 2}  # the first block was done before all this
    found = shards_of(out)
    assert found.keys() == undisturbed.keys()
    for name, tensors in undisturbed.items():
        assert all(torch.equal(tensor, found[name][key]) for key, tensor in tensors.items())


def one_fails(how, model, out, note):
    """Start three, of which one fails; see that all end as they should, and return how long the others took to."""
    who, code, *words = CASES[how]
    runs = started(model, out, disturbed, how, note)
    others = [run for rank, run in enumerate(runs) if rank != who]
    codes = [run.end() for run in others]
    taken = time.time() - float(note.read_text())
    if how == "hangs":
        runs[who].process.kill()  # as torchrun does as soon as another has ended
    assert runs[who].end() == code, (how, runs[who].said)
    assert codes == [1, 1], (how, [run.said for run in others])
    assert taken < SOON, how
    assert all(word in runs[who].said for word in words), runs[who].said
    if how == "hangs":
        assert "waited for process 2, which does not come" in others[0].said
    for run in others:
        assert re.search(r"^error: Process \d of 3 waited for .*, which", run.said, flags=re.MULTILINE), run.said
        assert "repeat the command" in run.said
        assert "Traceback" not in run.said
    return taken
