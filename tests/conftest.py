"""No test may reach a hub, and two workers must not fight over the cores."""

import functools
import gc
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


def pytest_collection_finish():
    # a run of sparlow collects garbage between blocks, and would look at all objects of torch, transformers and pytest
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no accelerator"))


@pytest.fixture(scope="session", autouse=True)
def short_answers():
    """Let models answer prompts with two tokens in place of forty, in every run that evaluates."""
    from sparlow.run import answers

    answers.TOKENS = 2


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk():
    """Let files be written without waiting for the disk: no test takes the power away. Other processes wait."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def structures_found_once():
    """Let models of one config share what they show without weights: it is a third of what a tiny run takes."""
    from sparlow.planning import feasibility

    known, real = {}, feasibility.known_ahead

    @functools.wraps(real)
    def known_ahead(model, dtype, *, trust_remote_code):
        config = Path(model) / "config.json" if isinstance(model, str | Path) else None
        if trust_remote_code or config is None or not config.is_file():
            return real(model, dtype, trust_remote_code=trust_remote_code)
        key = config.read_bytes(), dtype
        if key not in known:
            known[key] = real(model, dtype, trust_remote_code=False)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feasibility, "known_ahead", known_ahead)
        yield
