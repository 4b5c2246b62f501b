"""What is shown of a run as it goes."""

import io

import pytest
from rich.console import Console

from sparlow.progress import RESTORED, Progress, live
from sparlow.progress.live import Lines, Screen, watched
from sparlow.report.records import LayerRecord


@pytest.fixture
def clock(monkeypatch):
    """A clock that is put forward by hand."""
    now = [100.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    return now


def layer(block, error):
    return LayerRecord(block, "mlp.up_proj", (48, 32), "2:4", 0.5, 4, error, 9, 1.0, 0.0)


def test_lines_have_times_and_errors(clock):
    said = []
    lines = Lines(said.append)
    lines(Progress("dense perplexity", 1, 2))
    clock[0] += 7
    lines(Progress("dense perplexity", 2, 2))
    for block, error in enumerate((0.01, 0.03)):
        clock[0] += 60
        lines(Progress("blocks", block, 4, layer(block, error)))
        lines(Progress("blocks", block + 1, 4))
    assert said == [
        "dense perplexity: 2 of 2 (0:07)",
        "blocks: 1 of 4 (1:00, mean relative squared error 0.01000, 3:00 left)",
        "blocks: 2 of 4 (2:00, mean relative squared error 0.02000, 2:00 left)",
    ]


def test_a_second_text_is_a_stage_of_its_own(clock):
    said = []
    lines = Lines(said.append)
    for _ in range(2):
        for done in (1, 2):
            clock[0] += 5
            lines(Progress("dense perplexity", done, 2))
    assert said == ["dense perplexity: 2 of 2 (0:10)"] * 2


def test_what_was_restored_says_nothing_of_the_time_that_is_left(clock):
    said = []
    lines = Lines(said.append)
    for i in range(5):
        lines(Progress("blocks", i + 1, 7, note=RESTORED))
    clock[0] += 60
    lines(Progress("blocks", 6, 7))
    assert said == ["resumed at block 5", "blocks: 6 of 7 (1:00, 1:00 left)"]


def test_every_layer_is_told_of_where_that_is_asked_for():
    said = []
    Lines(said.append, every_layer=True)(Progress("blocks", 0, 4, layer(0, 0.01)))
    assert said == ["blocks: block 0, mlp.up_proj: relative error 0.01000, 1.0 s"]


def test_hundreds_of_steps_are_told_of_by_tenths(clock):
    said = []
    lines = Lines(said.append)
    for i in range(200):
        clock[0] += 1
        lines(Progress("fine-tuning", i + 1, 200, note="loss 3.1"))
    assert len(said) == 10


@pytest.mark.parametrize("width", [40, 80])
def test_a_screen_keeps_to_its_width_and_lists_what_ended(width, clock):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=width, color_system=None)
    shown = Screen(console)
    with shown.on():
        shown(Progress("hassle-free-sparsegpt: dense perplexity", 2, 2))
        clock[0] += 3661
        shown(Progress("hassle-free-sparsegpt: blocks", 0, 30, layer(0, 0.01)))
        shown(Progress("hassle-free-sparsegpt: blocks", 1, 30))
        first, second = (console.render_lines(shown.shown(), pad=False)[i] for i in (0, 1))
        text = ["".join(segment.text for segment in line) for line in (first, second)]
    assert max(map(len, text)) <= width
    assert "1/30" in text[0]
    assert "left" in text[0]
    assert "hassle" in text[0]
    assert text[1].startswith("block 0, mlp.up_proj: relative error 0")
    assert "hassle-free-sparsegpt:denseperplexity:0:00" in "".join(screen.getvalue().split())


def test_the_first_seconds_are_not_blank(clock):
    screen = io.StringIO()
    shown = Screen(Console(file=screen, force_terminal=True, width=80, color_system=None))
    with shown.on():
        clock[0] += 9
        (line,) = shown.shown().renderables
        assert str(line) == "starting 0:09"
    assert "starting" in screen.getvalue()


def test_names_of_strangers_cannot_move_the_cursor():
    screen = io.StringIO()
    shown = Screen(Console(file=screen, force_terminal=True, width=80, color_system=None))
    with shown.on():
        shown(Progress("evil\x1b[2Jname", 1, 1))
    assert "\x1b[2J" not in screen.getvalue()


def test_what_the_caller_gives_is_called_and_nothing_is_shown(capfd):
    steps = []
    with watched(steps.append) as notify:
        notify(Progress("blocks", 1, 2))
    with watched(None) as notify:
        notify(Progress("blocks", 1, 2))
    assert [step.done for step in steps] == [1]
    assert capfd.readouterr() == ("", "")
