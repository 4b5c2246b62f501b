"""Faults tried for real, and the table of what they cost: ``python tests/faults/faults.py``.

Every fault strikes a run of the command line, which is then repeated and compared, bit for bit, with an undisturbed
one. Lost work is the blocks that had to be solved again.
"""

import argparse
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # as pytest does

from bench import Bench, moments, small_disk

from processes import join, together


@dataclass
class Row:
    """What came of the tries of one fault."""

    fault: str
    tries: int = 0
    lost: int = 0  # blocks, at most in a try
    wrong: list[str] = field(default_factory=list)

    def note(self, lost, wrong):
        self.tries += 1
        self.lost = max(self.lost, lost)
        self.wrong += wrong

    def __str__(self):
        return f"| {self.fault} | {self.tries} | {self.lost} | {len(self.wrong)} |"


def again(bench, row, out, first):
    """Repeat the command of a run that was stopped, and note the difference; the last run."""
    if bench.finished(out):  # all was written, only its process was not over
        row.note(0, [f"{out.name}/{name}" for name in bench.wrong(out)])
        return first
    run = bench.run(out)
    code = run.end()
    wrong = [f"{out.name}: exit code {code}: {run.said}"] if code else [f"{out.name}/{n}" for n in bench.wrong(out)]
    row.note(len(first.solved & run.solved), wrong)
    return run


def expect(row, what, *, right):
    """Note what should have been otherwise."""
    if not right:
        row.wrong.append(what)


# Killed


def killed(bench, tries=25):
    row = Row("SIGKILL at a random moment")
    for moment in moments(bench, tries, "kill"):
        again(bench, row, *bench.stopped(bench.fresh(), moment, signal.SIGKILL))
    return row


def _die_at(call):
    """Die at the so many-th time that anything is brought to the disk: before or after it takes its name."""
    sync, calls = os.fsync, []

    def counted(descriptor):
        calls.append(descriptor)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(descriptor)

    os.fsync = counted


def killed_while_writing(bench, tries=12):
    row = Row("SIGKILL while a file is written or renamed")
    for i in range(tries):
        out = bench.fresh()
        first = bench.run(out, _die_at, 1 + 3 * i)
        code = first.end()
        expect(row, f"was not killed: {code} {first.said}", right=code == -signal.SIGKILL)
        again(bench, row, out, first)
    return row


def killed_again_and_again(bench, tries=2):
    row = Row("SIGKILL after every block")
    for i in range(tries):
        out, lost, before = bench.fresh(), 0, set()
        for block in range(1 + i, bench.blocks + 1):
            run = bench.run(out, _die_after, block)
            run.end()
            lost, before = max(lost, len(before & run.solved)), before | run.solved
        last = again(bench, row, out, run)
        row.lost = max(row.lost, lost, len(before & last.solved))
    return row


def interrupted(bench, tries=5):
    row = Row("Ctrl-C at a random moment")
    for moment in moments(bench, tries, "interrupt"):
        out, first = bench.stopped(bench.fresh(), moment, signal.SIGINT)
        code = first.process.exitcode
        # before the command line is there, Python itself ends the process
        right = code in (130, -signal.SIGINT, 1) and ("sparlow" not in first.said or "stopped: " in first.said)
        expect(row, f"exit code {code}: {first.said}", right=right)
        again(bench, row, out, first)
    return row


def one_of_two_killed(bench, tries=4):
    row = Row("SIGKILL of one of two processes")
    right, chance = bench.fresh(), random.Random(0)
    ends = [run.end() for run in _pair(bench, right)]
    expect(row, f"exit codes {ends}", right=ends == [0, 0])
    for i in range(tries):
        out = bench.fresh()
        pair = _pair(bench, out)
        while not any(run.solved for run in pair):  # before they have met, only torchrun would notice
            time.sleep(0.005)
        time.sleep(chance.uniform(0, bench.seconds / 4))
        os.kill(pair[i % 2].process.pid, signal.SIGKILL)
        ends = [run.end() for run in pair]
        other = pair[1 - i % 2]
        code, whole = other.process.exitcode, bench.finished(out)  # killed after the last meeting, the other is content
        right_end = (code == 0 and whole) or (code == 1 and "repeat the command" in other.said)
        expect(row, f"exit codes {ends}: {other.said}", right=right_end)
        repeated = [] if bench.finished(out) else _pair(bench, out)
        ends = [run.end() for run in repeated]
        lost = set.union(*(run.solved for run in pair)) & set.union(set(), *(run.solved for run in repeated))
        wrong = [f"{out.name}: {run.said}" for run in repeated if run.process.exitcode]
        row.note(len(lost), wrong or [f"{out.name}/{name}" for name in bench.wrong(out, right)])
    return row


def _pair(bench, out):
    return [bench.run(out, join, variables) for variables in together(2)]


def _die_in_training(step):
    """Keep the state of the training at every step, and die while that of this step is written or recorded."""
    from sparlow.model.training import resume_state
    from sparlow.run.journal import Journal

    keep, calls = Journal.keep_training, []

    def kept(self, tensors):
        calls.append(step)
        if len(calls) == step:
            _die_at(1 + step % 4)
        keep(self, tensors)

    resume_state.EVERY, Journal.keep_training = 0, kept


def training_killed(bench, tries=4):
    row, options = Row("SIGKILL while all blocks are trained (`--match`)"), ["--match", "--match-epochs", 2]
    right = bench.fresh()
    undisturbed = bench.run(right, command=[*bench.command(right), *options])
    expect(row, undisturbed.said, right=undisturbed.end() == 0)
    for i in range(tries):
        out = bench.fresh()
        command = [*bench.command(out), *options]
        first = bench.run(out, _die_in_training, 2 * i + 1, command=command)
        code = first.end()
        expect(row, f"was not killed: {code} {first.said}", right=code == -signal.SIGKILL)
        again = bench.run(out, command=command)
        code = again.end()
        wrong = [f"{out.name}: exit code {code}: {again.said}"] if code else bench.wrong(out, right)
        row.note(len(first.solved & again.solved), wrong)
    return row


def fine_tuning_killed(bench, tries=3):
    row = Row("SIGKILL while fine-tuning (lost: checkpoints)")
    steps, chance = 20, random.Random(0)
    text = bench.place / "text.txt"
    options = [
        "--dataset",
        text,
        "--steps",
        steps,
        "--block-size",
        16,
        "--batch",
        2,
        "--accumulate",
        1,
        "--evaluate",
        text,
    ]
    right = bench.fresh()
    undisturbed = bench.run(right, command=["finetune", bench.undisturbed, "--out", right, *options])
    expect(row, undisturbed.said, right=undisturbed.end() == 0)
    for _ in range(tries):
        out = bench.fresh()
        command = ["finetune", bench.undisturbed, "--out", out, *options]
        first, last = bench.run(out, command=command), chance.randrange(3, steps)
        while f"step {last}\n" not in first.said and first.process.exitcode is None:
            time.sleep(0.002)
        first.process.kill()
        first.end()
        again = bench.run(out, command=command)
        code = again.end()
        twice = [step for step in range(1, steps + 1) if all(f"step {step}\n" in run.said for run in (first, again))]
        wrong = [f"{out.name}: exit code {code}: {again.said}"] if code else bench.wrong(out, right)
        row.note(len(twice) // 2, wrong)  # there is a checkpoint after every second step
    return row


# Disks


def _limited(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def disk_full(bench, tries=6):
    whole = sum(path.stat().st_size for path in bench.undisturbed.iterdir())
    row = Row("disk full")
    for i in range(tries):
        size = int(whole * (i + 1) / (tries + 2))
        folder = bench.fresh()
        with small_disk(folder, size) as mounted:
            out = folder / "out"
            command = [*bench.command(out), "--force"]  # or it is refused before it begins
            limit = () if mounted else (_limited, size // 8)
            first = bench.run(out, *limit, command=command)
            code = first.end()
            said = code == 1 and "error: " in first.said and "Traceback" not in first.said
            expect(row, f"disk of {size} bytes: exit code {code}: {first.said}", right=said)
            if mounted:
                subprocess.run(["mount", "-o", f"remount,size={4 * whole}", folder], check=True)  # noqa: S607
            again(bench, row, out, first)
    return row


def read_only(bench, tries=2):
    row = Row("output is read-only when the run goes on")
    for i in range(tries):
        folder = bench.fresh()
        with small_disk(folder, 2**24) as mounted:
            out = folder / "out"
            if not mounted and os.geteuid() == 0:
                return row  # nothing is read-only for root
            first = bench.run(out, _die_after, 1 + i)
            first.end()
            _set_writable(folder, mounted, "ro")
            refused = bench.run(out)
            code = refused.end()
            right = code == 2 and "error: " in refused.said and "Traceback" not in refused.said
            expect(row, f"exit code {code}: {refused.said}", right=right)
            _set_writable(folder, mounted, "rw")
            again(bench, row, out, first)
    return row


def _set_writable(folder, mounted, how):
    if mounted:
        subprocess.run(["mount", "-o", f"remount,{how}", folder], check=True)  # noqa: S607
        return
    for path in (folder, *folder.rglob("*")):
        path.chmod(path.stat().st_mode & ~0o222 if how == "ro" else path.stat().st_mode | 0o200)


def _die_after(block):
    """Die when so many blocks are finished and recorded."""
    from sparlow.run.journal import Journal

    note = Journal.note_block

    def noted(self, *rest):
        note(self, *rest)
        if self.blocks_done == block:
            os.kill(os.getpid(), signal.SIGKILL)

    Journal.note_block = noted


def corrupted(bench, tries=6):
    row = Row("a shard damaged before the run goes on")
    chance = random.Random(0)
    half = max(bench.blocks // 2, 1)
    for i in range(tries):
        out = bench.fresh()
        first = bench.run(out, _die_after, half)
        first.end()
        shard = sorted(out.glob("*.safetensors"))[i % half]
        data = bytearray(shard.read_bytes())
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        if i % 3 == 2:
            shard.unlink()
        else:
            shard.write_bytes(data if i % 3 else data[: chance.randrange(len(data))])
        again(bench, row, out, first)
    return row


# Two at once


def two_at_once(bench, tries=2):
    row = Row("a second process on the same directory")
    for _ in range(tries):
        out = bench.fresh()
        first = bench.run(out)
        while not (out / "sparlow.json").exists() and first.process.exitcode is None:
            time.sleep(0.005)
        os.kill(first.process.pid, signal.SIGSTOP)  # so that it does not end before the other has looked
        second = bench.run(out)
        code = second.end()
        os.kill(first.process.pid, signal.SIGCONT)
        expect(row, f"{code}: {second.said}", right=code == 2 and "Another process" in second.said)
        expect(row, first.said, right=first.end() == 0)
        row.note(len(first.solved & second.solved), bench.wrong(out))
    return row


FAULTS = (
    killed,
    killed_while_writing,
    killed_again_and_again,
    interrupted,
    one_of_two_killed,
    training_killed,
    fine_tuning_killed,
    disk_full,
    read_only,
    corrupted,
    two_at_once,
)


def main():
    """Print the table; with a model of one's own, of three kills only."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", type=Path, help="directory of a real model, for three kills")
    parser.add_argument("options", nargs="*", help="of sparlow compress, after --")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(Path(place), given.model, given.options or ["--calibration", "builtin", "--samples", 8])
        rows = [killed(bench, tries=3)] if given.model else (fault(bench) for fault in FAULTS)
        print("| fault | tries | lost work, blocks at most | wrong results |\n|---|---|---|---|", flush=True)  # noqa: T201
        wrong = []
        for row in rows:
            print(row, *row.wrong, sep="\n", flush=True)  # noqa: T201
            wrong += row.wrong
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
