"""Tables that are wider than the terminal."""

from rich.console import Console

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
