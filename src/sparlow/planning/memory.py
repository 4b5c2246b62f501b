"""The memory and the disk that a run needs, stage by stage: what the code holds at once, counted from shapes.

Where blocks run on the CPU, everything below is in main memory. Where they run on an accelerator, what computes is
there, hidden states are where they wait, and main memory holds what is read from files (mapped, so it counts as
resident).
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from sparlow.linalg.grid import SCALE_BITS
from sparlow.machine import lies_in_memory
from sparlow.model.forward.capture import LOGITS_AT_ONCE
from sparlow.model.forward.generate import AT_ONCE
from sparlow.model.training.logit_pieces import PIECES
from sparlow.model.training.loop import BUCKET
from sparlow.planning.microbenchmarks import FLOAT, Workspace
from sparlow.planning.workload import Block, Layer, Workload
from sparlow.planning.workload import Stage as Observed
from sparlow.recipe.recipe import OWN_TEXT

SUM = 8  # bytes of each number of a Gram matrix while it is added up
LOADED_LATE = 30 * 10**6  # bytes of libraries that are loaded when they are first used
LARGEST_HELD = 2**25  # bytes: freed tensors of up to so many teach glibc to hold twice as much on its heap
RETURNED_FROM = "MALLOC_MMAP_THRESHOLD_"  # tells glibc, in the environment, from how many bytes on it holds none
KEPT_IN_TRAINING = 0.35  # times what a training holds, glibc keeps of what it freed (benchmarks/foreseen.py --glibc)
WALKED = 3  # copies of the hidden states while a block passes them on: of the first block, the inputs, the outputs
WAITING = 2  # copies otherwise
LOGITS = 3  # of a piece at a time: those of two models, and of an eighth of them what compares them
ADAM = 4 * FLOAT  # a number that is trained: itself, its gradient, two moments
BEST = FLOAT  # the parameters of the best epoch
POSITION = 4  # bytes for each kept entry of S that say where it is
STATE = 4  # numbers in a state of a training for each that is trained: now, at its best, two moments
SAVED_LOGITS = 6  # of a piece at a time, while distilling: both models', in two forms, and gradients


@dataclass(frozen=True)
class Stage:
    """The peak memory of one stage, beyond what the process holds before the run.

    Attributes:
        name: What is done.
        cpu: Bytes of main memory.
        device: Bytes of the accelerator; 0 where there is none.
    """

    name: str
    cpu: int
    device: int


@dataclass(frozen=True)
class Disk:
    """Bytes in files.

    Attributes:
        out: In the output directory at its fullest.
        second: Of these, what is there for a while when all blocks are trained together: states of the training, the
            copy of the blocks that replaces the first.
        hidden: Temporary ones, of hidden states.
    """

    out: int
    second: int
    hidden: int


def disk(work: Workload) -> Disk:
    """What a run writes."""
    second = 0
    if work.together:
        state = STATE * FLOAT * sum(block.trained for block in work.blocks)
        second = state + max(state, sum(block.kept_bytes(work.stored) for block in work.blocks))
    waiting = (WALKED + (_targets(work) > 0)) * work.hidden if work.place == "disk" else 0
    measured_there = work.where(work.evaluated_hidden) == "disk"
    measuring = WALKED * work.evaluated_hidden if measured_there else 0
    kept = work.predictions if measured_there else 0
    return Disk(work.kept_bytes + second, second, (kept + max(waiting, measuring)) * work.processes)


def written_already(folder: Path | None) -> int:
    """Bytes of shards that an unfinished or replaced run has written."""
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors")) if folder and folder.is_dir() else 0


def stages(work: Workload, space: Workspace) -> list[Stage]:
    """All stages of a run in order.

    Args:
        work: The run.
        space: What solving a layer takes.
    """
    return list(_Counted(work, space).all())


def _largest_held() -> int:
    """Return the bytes of the largest freed tensor that the C library may keep."""
    told = os.environ.get(RETURNED_FROM, "")
    return min(int(told), LARGEST_HELD) if told.isdecimal() else LARGEST_HELD


def _targets(work: Workload) -> int:
    """Return how many further copies of the hidden states there are: those of the dense model at the same block."""
    return int(work.recipe.match)


class _Counted:
    """Counts the bytes that are held."""

    def __init__(self, work: Workload, space: Workspace) -> None:
        self.work, self.space = work, space
        self.size = work.computing
        self.converted = work.stored != work.computing  # files stay mapped until the last tensor is another
        self.outside = work.outside * work.computing
        self.block = max(b.parameters for b in work.blocks) * work.computing
        self.on_cpu = work.device.type == "cpu"
        # what is always there: blocks grow by U and V
        whole = 0 if work.streamed or work.there else work.parameters * work.computing
        self.allocator = LOADED_LATE + 2 * min(work.largest * work.computing, _largest_held())
        whole += self.block if work.copied else 0
        # files that lie in main memory, as in a tmpfs
        self.files_in_memory = lies_in_memory(work.folder)
        self.written = 0
        if work.out is not None and self.files_in_memory:
            self.written = max(disk(work).out - written_already(work.out), 0)
        self.predictions = 0  # of the dense model, once it is measured
        self.always = whole + (0 if work.streamed else sum(b.low_rank for b in work.blocks) * work.computing)

    def all(self) -> Iterator[Stage]:
        work = self.work
        yield self._opening()
        if work.recipe.calibration == OWN_TEXT:
            yield self._writing_text()
        if work.evaluated:
            in_memory = work.where(work.evaluated_hidden) != "disk" or self.files_in_memory
            self.predictions = work.predictions if in_memory else 0
            yield self._evaluating()
        yield self._recording()
        yield self._statistics()
        yield self._solving()
        yield self._passing_on()
        yield self._saving()
        if work.by_block:
            yield self._matching(work.by_block.plan.batch)
        if work.together:
            yield self._distilling()

    def _stage(
        self, name: str, computing: float, *, files: float = 0, hidden: float = 0, where: torch.device | str = "cpu"
    ) -> Stage:
        waiting = {"cpu": hidden, "disk": hidden if self.files_in_memory else 0.0}.get(str(where))
        cpu = (
            self.allocator
            + self.written
            + self.predictions
            + files
            + (waiting or 0)
            + (self.always + computing if self.on_cpu else 0)
        )
        device = 0.0 if self.on_cpu else self.always + computing + (hidden if waiting is None else 0)
        if self.on_cpu and waiting is None:
            cpu += hidden
        return Stage(name, round(cpu), round(device))

    def _read(self, parameters: int) -> int:
        """Bytes of files that are mapped while so many parameters are read and become what they compute in."""
        if not self.work.streamed or (self.on_cpu and not self.converted):
            return 0
        return parameters * self.work.stored

    def _parts(self, *, rest: bool) -> tuple[int, int]:
        """Weights in memory and files mapped, while the rest is there with a block, or a block alone."""
        if not self.work.streamed:
            return 0, 0
        largest = max(b.parameters for b in self.work.blocks)
        if rest:
            return self.outside + self.block, max(self._read(self.work.outside) - self.block, self._read(largest))
        return self.block, self._read(largest)

    def _opening(self) -> Stage:
        work = self.work
        if work.there:
            return self._stage("opening", 0)
        if not work.streamed:
            return self._stage("opening", 0, files=work.parameters * work.stored if self.converted else 0)
        part = max(work.outside, *(b.parameters for b in work.blocks)) * work.stored
        return self._stage("opening", part, files=0 if self.on_cpu else part)

    def _writing_text(self) -> Stage:
        """The whole model, and its keys and values of all windows that are written together."""
        work, recipe = self.work, self.work.recipe
        whole = work.parameters * self.size if work.streamed else 0
        cache = 2 * len(work.blocks) * work.features * min(recipe.samples, AT_ONCE) * recipe.seqlen * self.size
        return self._stage("writing calibration text", whole + cache, files=self._read(work.parameters))

    def _activations(self, tokens: int, block: Block, seqlen: int) -> int:
        """Of a pass without gradients: the widest layers beside each other, and the states around them."""
        widest = max((max(layer.shape) for layer in block.layers), default=0)
        return tokens * (4 * widest + 4 * self.work.features) * self.size + self._attention(tokens, seqlen)

    def _attention(self, tokens: int, seqlen: int) -> int:
        """Attention weights of all pairs of tokens of a window: scores, masked ones, and a softmax in float32."""
        return tokens * seqlen * self.work.heads * (2 * self.size + 2 * FLOAT)

    def _formed(self, block: Block) -> int:
        """S + U V of the largest layer, which a pass of many tokens forms in full precision."""
        return max((layer.weights for layer in block.compressed), default=0) * FLOAT if self.size >= FLOAT else 0

    def _evaluating(self) -> Stage:
        work = self.work
        hidden = work.evaluated_hidden
        where = work.where(hidden)
        tokens = min(work.at_once(work.evaluate_seqlen) * work.evaluate_seqlen, work.evaluated)
        passes, mapped = self._parts(rest=False)
        passes += max(
            self._activations(tokens, block, work.evaluate_seqlen) + self._formed(block) for block in work.blocks
        )
        passes += max(b.low_rank for b in work.blocks)
        logits = LOGITS * FLOAT * min(LOGITS_AT_ONCE, tokens * work.vocabulary)
        head = self._parts(rest=True)[0] - self.block if work.streamed else 0
        blocks = self._stage("evaluation", passes, files=mapped, hidden=WALKED * hidden, where=where)
        ends = self._stage(
            "evaluation", head + logits, files=self._read(work.outside), hidden=WAITING * hidden, where=where
        )
        both, read = self._parts(rest=True)
        begins = self._stage("evaluation", both, files=read, hidden=hidden, where=where)
        parts = (begins, blocks, ends)
        return Stage("evaluation", max(part.cpu for part in parts), max(part.device for part in parts))

    def _recording(self) -> Stage:
        weights, files = self._parts(rest=True)
        tokens = self._activations(self.work.batch, self.work.blocks[0], self.work.recipe.seqlen)
        return self._stage("recording", weights + tokens, files=files, hidden=self.work.hidden, where=self.work.place)

    def _waiting(self) -> int:
        return (min(WAITING, len(self.work.blocks)) + _targets(self.work)) * self.work.hidden

    def _statistics(self) -> Stage:
        """A pass of the block, of which every input that is observed is kept until it is added to its Gram."""
        work = self.work
        weights, files = self._parts(rest=False)
        most = max(self._observed(block) for block in work.blocks)
        return self._stage("Grams", weights + most, files=files, hidden=self._waiting(), where=work.place)

    def _observed(self, block: Block) -> int:
        """Of the pass that needs the most: Grams and inputs, and U and V of layers that were compressed before it."""
        most, before = 0, 0
        activations = self._activations(self.work.batch, block, self.work.recipe.seqlen)
        for number, stage in enumerate(block.stages):
            formed = self._formed(block) if number else 0
            needed = max(self._grams(group, activations + formed) for group in self._together(stage))
            most = max(most, (before + self._beside(stage)) * self.size + needed)
            before += sum(layer.low_rank for layer in stage.layers)
        return max(most, activations)

    def _together(self, stage: Observed) -> list[Observed]:
        """Return the layers that are observed in one pass after the other; before an allocation, all are in one."""
        return [stage] if self.work.recipe.allocate == "error" else stage.groups

    def _beside(self, stage: Observed) -> int:
        """Entries of S of experts that are there beside all that is dense, whose memory they share until the last."""
        return stage.experts

    def _grams(self, group: Observed, pass_: int) -> int:
        """Of the sums, and of the inputs of a micro-batch while they wait for them."""
        features, shares = group.inputs, group.shares
        grams = SUM * sum(n**2 for n in (*features.values(), *group.pools.values()))
        inputs = self.work.batch * sum(shares[owner] * n for owner, n in features.items()) * self.size
        widest = FLOAT * max(n**2 for n in features.values())
        # the widest is last: its sum and the second moment made of it, then that and the damped one
        return max(grams + round(inputs) + pass_, (SUM // FLOAT + 1) * widest)

    def _solving(self) -> Stage:
        work = self.work
        weights, _ = self._parts(rest=False)
        most = max(self._solve(block) for block in work.blocks)
        return self._stage("solving", weights + most, hidden=self._waiting(), where=work.place)

    def _solve(self, block: Block) -> int:
        """Of the layer that needs the most: the Grams that are still waiting, and U and V of those that are done."""
        most, low_rank = 0, 0
        for stage, group in ((one, group) for one in block.stages for group in one.groups):
            readers: dict[str, list[Layer]] = {}
            for layer in group.compressed:
                readers.setdefault(layer.owner, []).append(layer)
            left = SUM * sum(n**2 for n in group.inputs.values())
            for owner, features in sorted(group.inputs.items(), key=lambda item: item[1]):
                left -= SUM * features**2
                waiting = left + SUM * sum(n**2 for n in group.pools.values())
                for layer in readers.get(owner, ()):
                    copied = layer.weights * self.work.stored if self.converted else 0
                    # where several processes divide its rows, an inverse that is found ahead
                    copied += FLOAT * features**2 if self.work.processes > 1 else 0
                    there = (low_rank + self._beside(stage)) * self.size + copied
                    most = max(most, waiting + there + self.space.bytes(layer.shape))
                    low_rank += layer.low_rank
        return most

    def _passing_on(self) -> Stage:
        work = self.work
        weights, _ = self._parts(rest=False)
        more = max(
            b.low_rank * self.size + self._activations(work.batch, b, work.recipe.seqlen) + self._formed(b)
            for b in work.blocks
        )
        copies = min(WALKED, len(work.blocks)) + _targets(work)
        return self._stage("passing on", weights + more, hidden=copies * work.hidden, where=work.place)

    def _saving(self) -> Stage:
        """What is kept in the type of the computation, then in that of the files."""
        work = self.work
        weights, _ = self._parts(rest=False)
        more = max(b.low_rank * self.size + b.kept_bytes(work.stored) for b in work.blocks)
        more += max(sum(layer.kept for layer in b.compressed) for b in work.blocks) * self.size
        return self._stage("saving", weights + more, hidden=self._waiting(), where=work.place)

    def _trained(self, block: Block) -> int:
        """Layers while they are trained: numbers, positions or levels, in place of their S and beside their U V."""
        beside = sum(self._beside_numbers(layer) for layer in block.compressed)
        own = sum(layer.weights for layer in block.compressed) * self.size
        return block.low_rank * self.size + block.trained * (ADAM + BEST) + beside - own

    def _beside_numbers(self, layer: Layer) -> int:
        """Bytes that say where the kept entries of S are, or which level of its grid each entry has."""
        if layer.budget and layer.budget.grid:
            return layer.weights * SCALE_BITS // 8
        return layer.budget.pattern.kept(layer.shape) * POSITION if layer.budget else 0

    def _saved(self, block: Block, tokens: int) -> int:
        """What a pass of a block leaves for its gradients: inputs of layers, S + U V, and levels that scales need."""
        formed = sum(layer.weights * (1 + bool(layer.budget and layer.budget.grid)) for layer in block.compressed)
        saved = (
            round(tokens * sum(layer.share * sum(layer.shape) for layer in block.layers))
            + 6 * tokens * self.work.features
        )
        return FLOAT * formed + saved * self.size + self._attention(tokens, self.work.recipe.seqlen)

    def _widest(self, blocks: tuple[Block, ...]) -> int:
        """Gradients of one layer on their way from S + U V to its parts."""
        return 3 * FLOAT * max((layer.weights for b in blocks for layer in b.compressed), default=0)

    def _sent(self, trained: int) -> int:
        """Gradients that are added up over several processes at a time: a bucket, and its parts side by side."""
        return min(BUCKET, FLOAT * trained) if self.work.processes > 1 else 0

    def _with_freed(self, training: int) -> float:
        """Bytes of a training in main memory with what it has freed: its tensors lie between others, unless large."""
        largest = max((FLOAT * layer.weights for block in self.work.blocks for layer in block.compressed), default=0)
        returned = largest > LARGEST_HELD or _largest_held() < LARGEST_HELD or not self.on_cpu
        return training * (1.0 if returned else 1 + KEPT_IN_TRAINING)

    def _matching(self, batch: int) -> Stage:
        work = self.work
        weights, _ = self._parts(rest=False)
        tokens = min(batch * work.recipe.seqlen, work.batch)
        held = max(
            self._trained(block) + self._saved(block, tokens) + self._sent(block.trained) for block in work.blocks
        )
        more = self._with_freed(held + self._widest(work.blocks))
        return self._stage("matching", weights + more, hidden=self._waiting(), where=work.place)

    def _distilling(self) -> Stage:
        """All blocks, of which only one at a time has what its gradients need, beside what enters each."""
        work = self.work
        whole = work.parameters * self.size if work.streamed or work.copied else 0
        trained = sum(self._trained(block) for block in work.blocks)
        entering = FLOAT * work.batch * work.features * len(work.blocks)
        logits = SAVED_LOGITS * FLOAT * min(LOGITS_AT_ONCE // PIECES, work.batch * work.vocabulary)
        saved = max(self._saved(block, work.batch) for block in work.blocks) + self._widest(work.blocks)
        saved += self._sent(sum(block.trained for block in work.blocks))
        more = max(trained + entering + max(saved, logits), 0)  # there is a time before, and after
        held = self._with_freed(whole + more)  # on a grid S is freed between what stays
        return self._stage("distilling", held, hidden=WAITING * work.hidden, where=work.place)
