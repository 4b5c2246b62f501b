"""Solves of several processes overlap: none waits for another one's solve before all have what they solve with."""

import torch
from torch import nn

from sparlow.distributed import Processes
from sparlow.linalg.gram import GramAccumulator
from sparlow.model.forward.block_pass import BlockPass
from sparlow.model.forward.input_statistics import Observation
from sparlow.recipe.recipe import Recipe
from sparlow.run.pipeline import with_grams

WIDTHS = {"wide": 12, "narrow": 4, "between": 8, "unseen": 6}


class Noting(Processes):
    """One of two processes, which only notes what it would exchange."""

    def __init__(self, rank, events):
        super().__init__(rank, 2)
        self.events = events

    def totals(self, numbers):
        return [*numbers]

    def reduce_to(self, tensor, wanting):
        self.events.append(("sum", len(tensor)))
        return self.rank in wanting


def observed():
    statistics = {}
    for name, width in WIDTHS.items():
        statistics[name] = GramAccumulator(width, torch.device("cpu"))
        if name != "unseen":
            statistics[name].add(torch.randn(20, width, generator=torch.Generator().manual_seed(width)))
    return Observation(statistics, {name: name for name in WIDTHS}, windows=2)


def test_every_sum_is_exchanged_before_the_first_solve_and_only_what_is_wanted_is_kept():
    block = nn.ModuleDict({name: nn.Linear(width, 4) for name, width in WIDTHS.items()})
    who = {"wide": 0, "narrow": 1, "between": 0, "unseen": 1}
    solved = {}
    for rank in (0, 1):
        events, seen = [], observed()
        through = BlockPass(block, None, None, processes=Noting(rank, events))
        for found in with_grams(through, seen, Recipe(), who):
            name, gram, tokens = found.layer, found.gram, found.tokens
            if not events or events[-1][0] == "sum":
                assert seen.statistics.keys() == {n for n in WIDTHS if who[n] == rank} - {name, "unseen"}
            events.append(("solve", name))
            solved[name] = (gram.H, tokens)
        assert events[:3] == [("sum", 4), ("sum", 8), ("sum", 12)]  # in one order everywhere
        assert [what for what, _ in events[3:]] == ["solve", "solve"]
    alone = with_grams(BlockPass(block, None, None), observed(), Recipe(), dict.fromkeys(WIDTHS, 0))
    expected = {found.layer: (found.gram.H, found.tokens) for found in alone}
    assert list(expected) == ["narrow", "between", "wide", "unseen"]  # the widest last, when the others are freed
    for name, (H, tokens) in expected.items():
        assert torch.equal(H, solved[name][0])
        assert tokens == solved[name][1]
