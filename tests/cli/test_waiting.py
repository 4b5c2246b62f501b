"""The sign of life before the first line."""

import io

import pytest

from sparlow.cli import display, waiting


@pytest.fixture
def console():
    yield display.SafeConsole(file=io.StringIO(), force_terminal=True, width=80, force_interactive=True)
    waiting.end()


def test_the_sign_is_there_at_once_and_goes_with_the_first_line(console):
    waiting.begin(console)
    assert "starting" in console.file.getvalue()
    console.print("this will take long")
    assert not waiting._shown
    assert console.file.getvalue().endswith("this will take long\n")
    before, _, after = console.file.getvalue().partition("starting")
    assert "\x1b[2K" in after  # its line is erased
    assert "\x1b[?25l" in before  # the cursor that is hidden is shown again
    assert "\x1b[?25h" in after


@pytest.mark.parametrize("end", [lambda: display.text("Once"), waiting.end])
def test_what_is_written_past_the_console_ends_it_too(end, console, capsys):
    waiting.begin(console)
    end()
    assert not waiting._shown
    assert "starting" not in capsys.readouterr().out


def test_where_nobody_watches_there_is_none():
    console = display.SafeConsole(file=io.StringIO(), force_terminal=False)
    waiting.begin(console)
    assert console.file.getvalue() == ""


def test_it_ends_whatever_happens(console):
    def interrupted():
        with waiting.ended():
            waiting.begin(console)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not waiting._shown
