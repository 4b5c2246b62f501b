"""Processes that were told different things say so when they meet, and none waits for one that was never started."""

import datetime as dt
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch import distributed as dist

from sparlow.distributed import Processes
from sparlow.errors import InputError
from sparlow.joining import Own, agree, differences

SHORT, LONG = dt.timedelta(seconds=0.3), dt.timedelta(seconds=60)


def meet(*told, timeout=LONG):
    """What becomes of processes, threads here, that were told these numbers and sizes: a sentence, or nothing."""
    keys = Own(dist.HashStore(), "")

    def one(rank, size):
        try:
            agree(keys, rank, size, timeout)
        except (InputError, RuntimeError) as error:
            return error
        return None

    with ThreadPoolExecutor(len(told)) as pool:
        return [*pool.map(one, *zip(*told, strict=True))]


def test_those_that_agree_meet():
    assert meet((1, 3), (0, 3), (2, 3)) == [None] * 3


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        ([(0, 2), (1, 3)], "was told that . processes were started together, process . that . were"),
        ([(0, 3), (1, 3), (1, 3)], r"Two processes were told that they are number 1 of 3 \(RANK\)"),
        ([(0, 2), (2, 2)], "was told that it is number 2 of 2, counted from 0"),
    ],
    ids=["other counts", "one number twice", "a number too large"],
)
def test_those_that_do_not_agree_say_so_at_once(told, sentence):
    start = time.monotonic()
    found = meet(*told)
    assert time.monotonic() - start < LONG.total_seconds() / 2
    for error in found:
        assert isinstance(error, InputError)
        with pytest.raises(InputError, match=sentence):
            raise error


def test_one_that_was_told_of_more_leaves_the_others_alone():
    *others, last = meet((0, 2), (1, 2), (2, 3))
    assert others == [None, None]
    assert "process 0 that 2 were" in str(last)


def test_one_that_does_not_come_is_named():
    assert [str(error) for error in meet((0, 2), timeout=SHORT)] == ["process 1 of 2 did not come"]


def test_one_that_ended_while_others_were_awaited_is_not_waited_for(monkeypatch):
    """As after Ctrl-C: what it said of itself is still there."""
    monkeypatch.setattr("sparlow.joining.AT_ONCE", 0.3)
    keys = Own(dist.HashStore(), "")
    keys.add("number 1", 1)
    keys.set("size of 1", "2")
    with pytest.raises(RuntimeError, match="one that had come has ended"):
        agree(keys, 0, 2, LONG)


def test_keys_of_an_earlier_meeting_do_not_count():
    store = dist.HashStore()
    for number in range(2):
        agree(Own(store, f"time {number} "), 0, 1, SHORT)


def test_what_processes_were_told_is_compared_by_name():
    first = {"samples": 128, "limit": None}
    assert differences([first, dict(first), dict(first)]) == []
    assert differences([first, first, {"samples": 64}]) == ["samples (128 in the first, 64 in process 2)"]
    second = Processes(1, 2)
    second.all_gather = lambda told: [{**told, "samples": 64}, told]
    with pytest.raises(InputError, match=r"differ in samples \(64 in the first, 128 in process 1\)"):
        second.require_alike(first)
    Processes().require_alike(first)
