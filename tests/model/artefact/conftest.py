"""A process that knows plain transformers only, for all tests of directories."""

import json
import os
import subprocess
import sys

import pytest

from artefacts import STRANGER

# Has imported plain transformers, which takes seconds, and computed nothing; forks itself for every program
WAITING = """
import json, os, sys, traceback
import torch, transformers.pipelines, transformers.models.llama.modeling_llama
for line in sys.stdin:
    arguments, code, path, output = json.loads(line)
    child = os.fork()
    if child == 0:
        file = os.open(output, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 1), os.dup2(file, 2)
        sys.argv[1:], sys.path[:0] = arguments, path
        try:
            exec(code, {"__name__": "__main__"})
            sys.stdout.flush()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="package")
def stranger(tmp_path_factory):
    """Runs a program in a process of its own that knows plain transformers only; gives what it says."""
    place = tmp_path_factory.mktemp("stranger")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_MODULES_CACHE": str(place / "code")}

    def run(how, folder, code=STRANGER, path=()):
        print(json.dumps([[how, str(folder)], code, list(path), str(place / "said")]), file=server.stdin, flush=True)
        ended = server.stdout.readline().strip()
        said = (place / "said").read_text()
        (place / "said").unlink()
        assert ended == "0", said
        return said.rpartition("\r")[2]  # what comes before are progress bars

    command = [sys.executable, "-c", WAITING]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as server:
        yield run
        server.stdin.close()
