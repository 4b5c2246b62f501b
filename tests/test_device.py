"""benchmarks/device.sh: what needs an accelerator, tried without one."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "device.sh"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="the benchmarks are in the repository only")
GOOD = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('{\"speed\": 3}')"


@pytest.fixture
def device(monkeypatch):
    """The module, and _checkout beside it, as a script finds it."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    for name in ("device", "_checkout"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("device")
    for name in ("device", "_checkout"):
        sys.modules.pop(name, None)


@pytest.fixture
def steps(device, monkeypatch, tmp_path):
    """Take small programs for steps, on a machine that is said to have a card; return what begins such a run."""

    def begin(*words, limits=(), **programs):
        made = []
        for (name, source), limit in zip(programs.items(), [*limits, *[20] * len(programs)], strict=False):
            file = tmp_path / f"{name}.py"
            file.write_text(source)
            made.append(device.Step(name, limit, f"{file} {{out}}", f"{file} {{out}}"))
        monkeypatch.setattr(device, "STEPS", tuple(made))
        versions = {"card": "NVIDIA H100 80GB HBM3", "python": "3.12.3", "torch": "2.11.0", "transformers": "5.17.0"}
        monkeypatch.setattr(device, "probe", lambda _: versions)
        monkeypatch.setattr(device, "commit", lambda: "0123456789abcdef-dirty")
        code = device.main(["--out", str(tmp_path / "out"), *words])
        record = json.loads((tmp_path / "out" / "nvidia-h100-80gb-hbm3-0123456789-dirty.json").read_text())
        return code, record, {row["name"]: row for row in record["steps"]}

    return begin


@pytest.mark.slow
def test_every_step_runs_in_its_smallest_form_without_an_accelerator_repository_or_installation(tmp_path):
    copy = tmp_path / "copy"
    for name in ("benchmarks", "src", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, copy)
    environment = {**os.environ, "OUT": str(tmp_path / "out"), "PYTHON": sys.executable, "PYTHONPATH": ""}
    command = [copy / "benchmarks" / "device.sh", "--dry-run"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (tmp_path / "out").glob("*.json")
    record = json.loads(file.read_text())
    assert (file.stem, record["commit"], record["card"], record["dry_run"]) == ("cpu-unknown", "unknown", None, True)
    assert {row["name"]: row["status"] for row in record["steps"]} == {
        "tests": "skipped",  # pytest ran, and its tests are skipped where there is no accelerator
        "layer": "ok",
        "block": "ok",
    }
    tests, layer, block = (row["figures"] for row in record["steps"])
    assert tests["skipped"] > 0 == tests["passed"]
    assert layer["parts"]["product, float32"] > 0
    assert block["block"]["measured"] > 0
    assert all(f"{name:<12} " in done.stdout for name in ("tests", "layer", "block"))


def test_all_steps_fit_into_eight_minutes(device):
    assert (
        sum(step.limit for step in device.STEPS) + sys.modules["_checkout"].PATIENCE + 20 <= 480
    )  # and what is between them
    assert all(name.isidentifier() for name in (step.name for step in device.STEPS))


@pytest.mark.slow
def test_a_step_that_fails_or_hangs_does_not_stop_the_next(steps, tmp_path, capsys):
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(tmp_path / 'alive')!r}).touch()"
    code, record, rows = steps(
        fails="import sys; print('the reason'); sys.exit(3)",
        hangs=f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)",
        silent="pass",
        broken="import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('{')",
        good=GOOD,
        limits=(20, 1),
    )
    assert code == 1
    assert {name: row["status"] for name, row in rows.items()} == {
        "fails": "failed",
        "hangs": "timed out",
        "silent": "failed",
        "broken": "failed",
        "good": "ok",
    }
    assert (rows["fails"]["note"], rows["silent"]["note"]) == ("exit code 3", "no figures were written")
    assert "cannot be read" in rows["broken"]["note"]
    assert rows["good"]["figures"] == {"speed": 3}
    assert 1 <= rows["hangs"]["seconds"] < 15
    keys = ("commit", "card", "torch", "transformers")
    assert [record[key] for key in keys] == ["0123456789abcdef-dirty", "NVIDIA H100 80GB HBM3", "2.11.0", "5.17.0"]
    shown = capsys.readouterr().out
    assert "    the reason" in shown
    assert "hangs        timed out" in shown
    time.sleep(3)
    assert not (tmp_path / "alive").exists()  # what a step started ends with it


def test_all_is_well_if_every_step_is_or_was_not_asked_for(steps):
    assert steps(one=GOOD, two=GOOD)[0] == 0
    code, _, rows = steps("--only", "two", one="1 / 0", two=GOOD)
    assert code == 0
    assert (rows["one"]["status"], rows["two"]["status"]) == ("skipped", "ok")


@pytest.mark.parametrize(("dry", "status"), [(True, "skipped"), (False, "failed")])
def test_tests_that_were_all_skipped_are_no_success_on_an_accelerator(dry, status, device, tmp_path):
    program = tmp_path / "program.py"
    case = '<testsuite><testcase classname="a" name="b"><skipped/></testcase></testsuite>'
    program.write_text(f"import pathlib, sys; pathlib.Path(sys.argv[1]).write_text({case!r})")
    step = device.Step("tests", 20, f"{program} {{out}}", f"{program} {{out}}", device.counts_of)
    assert device.run(step, tmp_path, dict(os.environ), dry=dry)["status"] == status


def test_outcomes_of_tests_are_counted(device, tmp_path):
    file = tmp_path / "junit.xml"
    cases = {"good": "", "bad": "<failure/>", "worse": "<error/>", "later": "<skipped/>"}
    inside = "".join(f'<testcase classname="tests.a" name="{name}">{kind}</testcase>' for name, kind in cases.items())
    file.write_text(f"<testsuites><testsuite>{inside}</testsuite></testsuites>")
    names = ["tests.a::bad", "tests.a::worse"]
    assert device.counts_of(file) == {"passed": 1, "failed": 2, "skipped": 1, "names_of_failed": names}


def test_without_an_accelerator_it_says_so(device, monkeypatch, tmp_path, capsys):
    nothing = {"card": None, "python": "3.12.3", "torch": "2.11.0", "transformers": "5.17.0"}
    monkeypatch.setattr(device, "probe", lambda _: nothing)
    assert device.main(["--out", str(tmp_path / "out")]) == 2
    assert "finds no accelerator here: --dry-run" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_missing_and_not_brought_along_is_named(device, monkeypatch, tmp_path, capsys):
    checkout = sys.modules["_checkout"]
    monkeypatch.setattr(checkout, "_installed", lambda name: name != "tomli-w")
    assert checkout.missing() == ["tomli-w"]
    monkeypatch.setattr(device, "install", lambda names, site: checkout.install(names, site, tmp_path))
    assert device.main(["--out", str(tmp_path / "out"), "--dry-run"]) == 2
    assert "lacks tomli-w: run benchmarks/device.sh --wheels" in capsys.readouterr().err


def test_the_commit_is_git_s_or_that_of_the_note_if_it_is_about_these_sources(device, tmp_path):  # noqa: ARG001
    checkout = sys.modules["_checkout"]
    source = tmp_path / "src" / "module.py"
    source.parent.mkdir()
    source.write_text("x = 1\n")
    (tmp_path / "pyproject.toml").touch()
    assert checkout.commit(tmp_path) == "unknown"
    note = tmp_path / ".wheels" / "commit.json"
    note.parent.mkdir()
    note.write_text(json.dumps({"commit": "abc", "sources": checkout.digest(tmp_path)}))
    assert checkout.commit(tmp_path) == "abc"
    source.write_text("x = 2\n")
    assert checkout.commit(tmp_path) == "unknown"
    git = shutil.which("git")
    if git is None:
        pytest.skip("there is no git")
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    for words in (("init", "-q"), ("add", "src", "pyproject.toml"), (*who, "commit", "-q", "-m", "first")):
        subprocess.run([git, "-C", tmp_path, *words], check=True)
    head = subprocess.check_output([git, "-C", tmp_path, "rev-parse", "HEAD"], text=True).strip()
    assert checkout.commit(tmp_path) == head
    source.write_text("x = 3\n")
    assert checkout.commit(tmp_path) == f"{head}-dirty"
