"""What a report of a bug needs: the machine, what is installed, and where things lie."""

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version

import torch

from sparlow.files import cache_folder, human_bytes
from sparlow.machine import described, machine, memory_available, versions

PACKAGES = (
    *("numpy", "tokenizers", "datasets", "accelerate", "huggingface-hub", "typer", "rich"),
    *("peft", "lm-eval", "gguf", "sentencepiece", "matplotlib", "pandas", "compressed-tensors", "vllm"),
)
VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "SPARLOW_CACHE", "SPARLOW_MODE", "NO_COLOR")


def environment() -> dict[str, str]:
    """Return it by name; names of folders and users are not in it, but for the cache's."""
    found = {name: text for name, text in versions().items() if name != "python"}
    found |= {name: _version(name) for name in PACKAGES}
    found |= {
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": platform.platform(),
        "machine": described(machine()),
        "kernels of torch": torch.backends.cpu.get_cpu_capability(),
        "CUDA of torch": str(torch.version.cuda or "none"),
        "memory free": human_bytes(memory_available()),
        "compiler": next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), "none"),
        "cache": str(cache_folder()),
    }
    return found | {name: os.environ[name] for name in VARIABLES if name in os.environ}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
