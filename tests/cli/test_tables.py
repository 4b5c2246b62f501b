"""Tables that are wider than the terminal."""

import io

import pytest
from rich.console import Console

from sparlow.cli.display import SafeConsole
from sparlow.cli.tables import pieces, show_wide

HEAD = ("form", "whole file", "bits", "what opens it")
ROWS = [("every entry, int4", "88.3 MB", "4.50", "x" * 30), ("dense", "269.0 MB", "16.00", "all")]


def test_what_fits_is_one_table():
    assert pieces(HEAD, ROWS, 1, 200) == [[0, 1, 2, 3]]


def test_what_does_not_fit_goes_below_with_the_same_first_columns():
    assert pieces(HEAD, ROWS, 1, 50) == [[0, 1, 2], [0, 3]]
    assert pieces(HEAD, ROWS, 2, 40) == [[0, 1, 2], [0, 1, 3]]
    assert pieces(HEAD, ROWS, 1, 5) == [[0, 1], [0, 2], [0, 3]]


def test_no_line_is_wider_than_the_terminal():
    console = Console(width=50, record=True, file=None, force_terminal=False)
    with console.capture() as shown:
        show_wide(console, HEAD, ROWS, left=True)
    lines = shown.get().splitlines()
    assert max(map(len, lines)) <= 50
    first = ["form", "every entry, int4", "dense"]
    assert [line.split("  ")[0] for line in lines] == [*first, "", *first]


def printed(text, *, terminal, width=30, **options):
    file = io.StringIO()
    SafeConsole(file=file, force_terminal=terminal, width=width, soft_wrap=True, color_system=None).print(
        text, **options
    )
    return file.getvalue()


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("[bold]one[/] two three four five six seven", ["one two three four five six", "seven"]),
        ("    gave: indented more than a line", ["    gave: indented more than a", "    line"]),
        ("see /a/path/longer/than/the/line/itself for it", ["see", "/a/path/longer/than/the/line/itself", "for it"]),
        ("日本語 日本語 日本語 日本語 日本語", ["日本語 日本語 日本語 日本語", "日本語"]),
        ("first\n\nsecond\n", ["first", "", "second", ""]),
        ("exactly thirty letters wide ok", ["exactly thirty letters wide ok"]),
        ("", [""]),
    ],
)
def test_a_sentence_is_broken_between_words(text, lines):
    assert printed(text, terminal=True).split("\n")[:-1] == lines


def test_where_nobody_looks_a_sentence_is_one_line_and_brackets_stay_where_they_are_meant():
    assert printed("word " * 20, terminal=False) == "word " * 20 + "\n"
    assert printed("a [red]b[/]", terminal=True, markup=False) == "a [red]b[/]\n"
