"""Warnings are listed in one place: each that a run can give, and no other."""

import re
from pathlib import Path

from messages import messages
from sparlow.cli.cautions import CAUTIONS, page

ROOT = Path(__file__).resolve().parents[2]


def bare(text):
    """Without what only the run knows."""
    return re.sub(r"…(?:[^\w.,;()]*…)*", "…", re.sub(r"\{[^{}]*\}", "…", text))


def is_of(text, caution):
    parts = [re.escape(part) for part in bare(caution.says).split("…")]
    return re.fullmatch("[^.]*?".join(parts) if parts[0] else ".*?" + ".*?".join(parts[1:]), bare(text))


def test_every_warning_of_the_code_is_listed_once():
    found = [message for message in messages() if message.kind == "warning"]
    assert len(found) > 15
    for message in found:
        listed = [caution for caution in CAUTIONS if bare(caution.says) == bare(message.text)]
        assert len(listed) == 1, f"{message.where}: {message.text} is to be listed in sparlow/cli/cautions.py"


def test_nothing_is_listed_that_no_code_says():
    said = {bare(message.text) for message in messages()}
    unsaid = [c.says for c in CAUTIONS if not any(bare(c.says) in text or is_of(text, c) for text in said)]
    assert not unsaid


def test_the_page_is_what_the_list_says():
    assert (ROOT / "docs" / "warnings.md").read_text("utf-8") == page()
