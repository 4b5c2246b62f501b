"""The commands of docs/distributed.md, as they stand there, on one CPU: fewer processes, a small model."""

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from documented import blocks
from families import save_tiny
from sparlow.report.records import Report
from sparlow.run.verify import verify_artefact

PAGE = "docs/distributed.md"
TEXT = "".join(chr(32 + (7 * i * i + i // 3) % 95) for i in range(900))
SMALL = "--samples 7 --seqlen 16 --algorithm wanda --evaluate= --device cpu"  # no quotes, which may be inside others
# As a cluster starts tasks: each step on every node, each with the variables that it sets.
SRUN = """#!/bin/bash
for node in 0 1; do for task in $(seq 0 $((SLURM_NTASKS_PER_NODE - 1))); do
  SLURM_PROCID=$((node * SLURM_NTASKS_PER_NODE + task)) SLURM_LOCALID=$task SLURM_NODEID=$node "$@" &
  pids="$pids $!"
done; done
for pid in $pids; do wait $pid || failed=1; done
exit ${failed:-0}
"""
SCONTROL = """#!/bin/bash
[ "$1 $2 $3" = "show hostnames machine-[1-2]" ] && printf '127.0.0.1\\nmachine-2\\n'
"""
COMMANDS = {  # what a block of the page holds, and processes in each machine: of one, or of two
    "one machine": ("--standalone", 2),
    "two machines": ("--rdzv-endpoint HOST", 1),
    "slurm and torchrun": ("srun torchrun", 1),
    "slurm alone": ("srun bash", 2),
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many") / "model"
    save_tiny("llama", folder)
    (folder.parent / "text.txt").write_text(TEXT)
    return folder


def free_port():
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


def said_on_the_page(part):
    """The one block that holds this."""
    (found,) = [block.text for block in blocks(PAGE) if block.language == "bash" and part in block.text]
    return found


def made_small(text, model, out, each):
    """The same command for so many processes a machine, a small model, and a text that is there."""
    for word, instead in {"MODEL": model, "OUT": out, "c4": f"{model.parent / 'text.txt'} {SMALL}"}.items():
        assert f" {word}" in text
        text = text.replace(f" {word}", f" {instead}")
    text = text.replace(" HOST:", " 127.0.0.1:")
    return text.replace("--nproc-per-node 8", f"--nproc-per-node {each}").replace("29500", str(free_port()))


def environment(folder, tasks):
    """With commands of a cluster, and the interpreter's own programs first."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        path = folder / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    cluster = {"SLURM_JOB_NODELIST": "machine-[1-2]", "SLURM_NNODES": 2, "SLURM_JOB_ID": 7, "SLURM_NTASKS": 2 * tasks}
    cluster |= {"SLURM_NTASKS_PER_NODE": tasks, "OMP_NUM_THREADS": 1}
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    return os.environ | {name: str(value) for name, value in cluster.items()} | {"PATH": path}


@pytest.mark.parametrize("case", COMMANDS)
def test_a_command_of_the_page_compresses_a_model(case, model, tmp_path):
    out, (part, each) = tmp_path / "out", COMMANDS[case]
    text = made_small(said_on_the_page(part), model, out, each)
    variables = environment(tmp_path, each if case == "slurm alone" else 1)
    typed = 2 if case == "two machines" else 1
    (tmp_path / "job.sh").write_text(text)
    command, pipes = ["/bin/bash", tmp_path / "job.sh"], {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    runs = [subprocess.Popen(command, env=variables, text=True, **pipes) for _ in range(typed)]
    said = [run.communicate(timeout=300)[0] for run in runs]
    assert [run.returncode for run in runs] == [0] * typed, said
    assert not any("Traceback" in words or "node_rank" in words for words in said), said
    assert Report.from_file(out / "report.json").processes["count"] == (each if case == "one machine" else 2 * each)
    assert verify_artefact(out) == []
