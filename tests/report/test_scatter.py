import random
import re

import pytest

from sparlow.report import svg
from sparlow.report.scatter import Mark, front, labels, scatter
from sparlow.report.svg import Axis


def overlap(a, b):
    return min(a[2], b[2]) > max(a[0], b[0]) and min(a[3], b[3]) > max(a[1], b[1])


@pytest.mark.parametrize("seed", range(5))
def test_names_do_not_collide_and_stay_in_the_picture(seed):
    chance = random.Random(seed)
    frame = (60, 10, 466, 316)
    points = {f"method-{i}": (chance.uniform(70, 450), chance.uniform(20, 300)) for i in range(12)}
    found = labels(points, list(points.values()), frame)
    assert sorted(label.name for label in found) == sorted(points)
    for i, label in enumerate(found):
        assert frame[0] <= label.box[0] < label.box[2] <= frame[2]
        assert not any(overlap(label.box, other.box) for other in found[:i])
        assert not any(overlap(label.box, (x - 4, y - 4, x + 4, y + 4)) for x, y in points.values())


def test_methods_at_one_place_have_names_of_their_own():
    found = labels(dict.fromkeys("abcde", (200, 150)), [(200, 150)], (60, 10, 466, 316))
    assert not any(overlap(a.box, b.box) for i, a in enumerate(found) for b in found[:i])


def test_the_front_is_what_nothing_beats():
    marks = [Mark("a", 0, 1, 30), Mark("b", 0, 2, 40), Mark("c", 0, 3, 20), Mark("d", 0, 3, 25), Mark("e", 0, 9, 20)]
    assert [mark.name for mark in front(marks)] == ["a", "c"]


def test_an_arrow_leads_to_the_matched_one():
    marks = [Mark("a", 0, 1.0, 30.0, to="a+match"), Mark("a+match", 0, 50.0, 20.0), Mark("b", 1, 3.0, 25.0, to="c")]
    drawn = scatter(marks, "seconds", 15.0, "said", log_x=True)
    assert drawn.count('class="arrow"') == drawn.count('class="head"') == 1
    assert ">dense<" in drawn


@pytest.mark.parametrize("values", [[], [float("inf")], [float("inf"), 20.0], [20.0, 20.0], [1e-9, 1e300]])
def test_odd_values_are_drawn_or_left_out(values):
    drawn = scatter([Mark(str(i), i, 1.0 + i, y) for i, y in enumerate(values)], "s", None, "said", log_x=True)
    assert drawn.count("<circle") == sum(value < 1e15 for value in values)
    assert not re.search(r"nan|inf", drawn.replace("info", ""))


def test_colours_and_names_of_many_methods():
    marks = [Mark(f"m{i}", i, 1.0 + i, 50.0 - i % 7) for i in range(40)]
    drawn = scatter(marks, "s", None, "said", log_x=False)
    assert drawn.count("<circle") == 40
    assert len(re.findall('class="name"', drawn)) == len(front(marks)) < 40


@pytest.mark.parametrize(
    ("low", "high", "log"),
    [(0, 1, False), (13.2, 95, True), (20.1, 20.4, True), (0, 29, False), (1e-6, 0.02, True), (-3, 1e6, False)],
)
def test_an_axis_has_some_round_ticks_within_its_range(low, high, log):
    ticks = Axis("x", low, high, log=log).ticks()
    assert 2 <= len(ticks) <= 8
    assert all(low <= tick <= high for tick in ticks)
    assert len({svg.tick_text(tick) for tick in ticks}) == len(ticks)
