"""A place where runs are started, disturbed and compared with an undisturbed one."""

import json
import os
import random
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

from processes import Run

TESTS = Path(__file__).parents[1]
TEXT = "".join(chr(32 + (7 * i * i + i // 3) % 95) for i in range(900))
BLOCKS = 4
TINY = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


class Bench:
    """A model, a text and the result of an undisturbed run on them.

    Args:
        place: A directory for all of it, empty.
        model: A model's directory; a tiny one is made if left out.
        options: Of the command line, for that model.
    """

    def __init__(self, place, model=None, options=()):
        self.place, self.model, self.count = place, model or place / "model", 0
        text = place / "text.txt"
        text.write_text(TEXT)
        self.options = ["--calibration", text, "--samples", 8, "--seqlen", 16, "--rank", 4, "--evaluate", text]
        self.options += ["--option", "effort=0.1", "--option", "max_steps=4"]
        if model is None:
            subprocess.run([sys.executable, __file__, str(self.model)], check=True, env=os.environ | _paths())
        else:
            self.options = list(options)
        self.undisturbed = place / "undisturbed"
        # the first starts the server too, which matters to a run of a second
        for out in (self.undisturbed, self.fresh()) if model is None else (self.undisturbed,):
            run = self.run(out)
            assert run.end() == 0, run.said
        assert self.wrong(out) == []
        self.seconds, self.blocks = run.seconds, len(run.solved)

    def command(self, out):
        return ["compress", self.model, "--out", out, *self.options]

    def run(self, out, prepare=None, argument=None, command=None):
        self.count += 1
        return Run(command or self.command(out), self.place / f"log-{self.count}.txt", prepare, argument)

    def stopped(self, out, moment, number):
        """A run that got a signal at a moment; sooner, in another directory, if it was over by then."""
        while True:
            run = self.run(out)
            run.process.join(moment)
            if run.process.exitcode is None:
                os.kill(run.process.pid, number)
                if run.end() != 0:
                    return out, run
            assert self.wrong(out) == []
            out, moment = self.fresh(), moment / 2

    def fresh(self):
        """A directory's name that was not used yet."""
        self.count += 1
        return self.place / f"out-{self.count}"

    def finished(self, out):
        """Whether the record there says that the result is whole."""
        record = out / "sparlow.json"
        return record.exists() and json.loads(record.read_text())["finished"]

    def wrong(self, out, right=None):
        """The files that are not, bit for bit, those of an undisturbed run; of records, what is not about time."""
        ours, theirs = _content(out), _content(right or self.undisturbed)
        return sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))


TIMED = ("seconds", "date", "peak_memory", "warnings", "machine", "processes")


def _content(folder):
    found = {path.name: path for path in folder.iterdir()}
    for name in ("report.html", ".sparlow.lock"):  # the first tells times, the second is left by a kill at the end
        found.pop(name, None)
    records = {name: _timeless(json.loads(found.pop(name).read_text())) for name in ("sparlow.json", "report.json")}
    return {name: path.read_bytes() for name, path in found.items()} | records


def _timeless(value):
    if isinstance(value, dict):
        return {name: _timeless(item) for name, item in value.items() if name not in TIMED}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def _paths():
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))}


@contextmanager
def small_disk(folder, size):
    """A file system of ``size`` bytes at ``folder``, or nothing where mounting is not allowed; yields whether."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    mounted = shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0  # noqa: PLW1510
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", folder], check=True)  # noqa: S607


def moments(bench, tries, seed):
    """Seeded moments within an undisturbed run."""
    chance = random.Random(seed)
    return [chance.uniform(0, bench.seconds) for _ in range(tries)]


def make_model(folder):
    """Write a tiny random model and its tokenizer; in a process of its own, so that the server's stays clean."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from families import tiny_tokenizer

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TINY))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(1.0 if p.ndim == 1 else 0.0, 0.2)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


if __name__ == "__main__":
    make_model(sys.argv[1])
