"""Every script of benchmarks/ follows the package: it can be imported, and says how it is called."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the benchmarks are in the repository only")

# All in one process of their own, as they register algorithms and have names such as "plan".
TRIED = """
import contextlib, importlib, io, json, sys, traceback
found = {}
for name in sys.argv[1:]:
    said = io.StringIO()
    try:
        script = importlib.import_module(name)
        sys.argv = [f"{name}.py", "--help"]
        with contextlib.redirect_stdout(said):
            script.main() if not name.startswith("_") else print("usage:")
    except SystemExit as end:
        found[name] = [end.code or 0, said.getvalue()]
    except BaseException:
        found[name] = [1, traceback.format_exc()]
    else:
        found[name] = [0, said.getvalue()]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def tried():
    command = [sys.executable, "-c", TRIED, *NAMES]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_is_imported_and_shows_its_help(name, tried):
    code, said = tried[name]
    assert code == 0, said
    assert said.startswith("usage:")
