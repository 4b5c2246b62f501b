"""The time a run needs, stage by stage: what is counted from shapes, over what this machine was seen to do."""

from sparlow.linalg.gram import PANELS
from sparlow.model.forward.generate import AT_ONCE
from sparlow.model.training.loop import TrainingPlan
from sparlow.planning.microbenchmarks import Solver, Speed
from sparlow.planning.workload import Block, Workload
from sparlow.recipe.recipe import OWN_TEXT
from sparlow.recipe.training_plan import last_read

HALF = (PANELS + 1) / (2 * PANELS)  # of a symmetric product is computed
BACKWARD = 3  # times a pass, with gradients
AGAIN = 1  # pass more where all blocks are trained together, each of which is computed again for its gradients
PASSES = 12  # over a state or the widest activations that a block takes besides products: norms, rotations, sums
PACKED_PASSES = 16  # over a weight at each step of training: S put together, its gradient taken apart, Adam
LOADED = 3  # passes over weights as they are read, converted and put in place
CHECKED = 4  # passes over weights that are looked at for NaN
WRITTEN = 2  # times what is written goes through a hash or a file


def seconds(work: Workload, speed: Speed, solver: Solver) -> dict[str, float]:
    """Seconds by stage, as in ``report.json``; 0 for a stage that is skipped.

    Args:
        work: The run.
        speed: Of this machine.
        solver: What a layer takes.
    """
    counted = _Counted(work, speed)
    found = {
        "opening": counted.opening(),
        "calibration": counted.writing_text() if work.recipe.calibration == OWN_TEXT else 0.0,
        "evaluate": counted.evaluating(),
        "walk": counted.walking(),
        "solve": sum(_solved(block, solver) for block in work.blocks),
        "matching": counted.training(),
        "save": counted.saving(),
    }
    return {**found, "total": sum(found.values())}


def _solved(block: Block, solver: Solver) -> float:
    met: set[str] = set()
    total = 0.0
    for layer in block.compressed:
        total += solver.seconds(layer.shape, first=layer.owner not in met)
        met.add(layer.owner)
    return total


class _Counted:
    """Counts operations and bytes."""

    def __init__(self, work: Workload, speed: Speed) -> None:
        self.work, self.speed = work, speed
        self.size = work.computing

    def _pass(
        self, block: Block, tokens: int, seqlen: int, *, low_rank: bool = False, parameters: int | None = None
    ) -> float:
        """A block over so many tokens: products, attention (half of it is masked), what is not a product.

        ``parameters`` are those that the tokens pass through, where that is not all of the block.
        """
        features = self.work.features
        used = block.passed if parameters is None else parameters
        products = 2 * (used + (block.low_rank if low_rank else 0)) + 2 * seqlen * features
        widest = max((max(layer.shape) for layer in block.layers), default=features)
        moved = PASSES * (features + widest) * self.size
        return tokens * (products / self.speed.products + moved / self.speed.memory)

    def _loading(self) -> float:
        """Reading every block once, from files in the system's cache."""
        work = self.work
        return LOADED * work.parameters * self.size / self.speed.memory if work.streamed else 0.0

    def opening(self) -> float:
        """Computing the fingerprint of the model, and checking every number."""
        size = self.work.parameters * self.work.stored
        return size / self.speed.hashing + CHECKED * size / self.speed.memory

    def writing_text(self) -> float:
        """Generating token by token, each of which reads all weights."""
        work, recipe = self.work, self.work.recipe
        rounds = -(-recipe.samples // AT_ONCE) * recipe.seqlen
        read = rounds * work.parameters * self.size / self.speed.memory
        return read + 2 * work.parameters * work.tokens / self.speed.products

    def evaluating(self) -> float:
        """Measuring the dense model, then the compressed one, with the dense model's head beside it."""
        work, total = self.work, 0.0
        for windows in work.evaluation.values():
            tokens = windows * work.evaluate_seqlen
            head = 3 * tokens * (2 * work.vocabulary * work.features / self.speed.products)
            blocks = sum(
                self._pass(block, tokens, work.evaluate_seqlen, low_rank=low_rank)
                for block in work.blocks
                for low_rank in (False, True)
            )
            total += head + blocks + 2 * self._loading()
        return total

    def walking(self) -> float:
        """The passes of each block with its Grams, and one of each block in front of the last that is looked into."""
        work = self.work
        tokens, seqlen = work.tokens, work.recipe.seqlen
        total = self._loading()
        last = last_read([bool(block.compressed) for block in work.blocks], work.by_block)
        for i, block in enumerate(work.blocks):
            seen = block.compressed or work.by_block
            grams = self._grams(block) if seen else 0.0
            walked_before = work.recipe.allocate != "uniform"
            total += self._observing(block) * bool(seen) + walked_before * self._pass(block, tokens, seqlen)
            total += (1 + (work.recipe.allocate == "error")) * grams / self.speed.products
            total += self._pass(block, tokens, seqlen, low_rank=True) if i < last else 0.0
        return total

    def _grams(self, block: Block) -> float:
        """Products that statistics take."""
        found = 0.0
        for group in (group for stage in block.stages for group in stage.groups):
            shares = group.shares
            found += sum(shares[owner] * features**2 for owner, features in group.inputs.items())
            found += sum(features**2 for features in group.pools.values())
        return HALF * 2 * self.work.tokens * found

    def _again(self, block: Block) -> float:
        """Further passes, where the statistics of experts are more than are in memory at the same time."""
        further = sum(len(stage.groups) - 1 for stage in block.stages)
        return further * self._pass(block, self.work.tokens, self.work.recipe.seqlen)

    def _observing(self, block: Block) -> float:
        """All passes in which inputs are observed. With one it is the whole block; of several, each ends at its layers.

        Before several, some windows show the order of the layers, and where the outputs are wanted the first is whole.
        """
        work, seqlen = self.work, self.work.recipe.seqlen
        if len(block.stages) < 2:  # noqa: PLR2004 - one after the other
            return self._pass(block, work.tokens, seqlen) + self._again(block)
        whole = bool(work.by_block and not work.by_block.dense_targets)
        total = self._pass(block, work.tokens if whole else min(work.batch, work.tokens), seqlen)
        passed = 0
        for stage in block.stages[:-1]:
            passed += round(sum(layer.share * (layer.parameters + layer.low_rank) for layer in stage.layers))
            total += self._pass(block, work.tokens, seqlen, parameters=passed)
        return total + self._again(block)

    def _trained(self, block: Block, plan: TrainingPlan) -> float:
        """All epochs of one block, including the loss on held-out windows after each; the head is not counted."""
        work = self.work
        once = self._pass(block, work.tokens, work.recipe.seqlen)
        steps = -(-work.recipe.samples // plan.batch)
        weights = sum(layer.weights for layer in block.compressed)
        packed = steps * PACKED_PASSES * weights * self.size / self.speed.memory
        return plan.epochs * ((BACKWARD + AGAIN * bool(work.together)) * once + packed)

    def training(self) -> float:
        """Targets, and all epochs of each block by itself or of all together, with the logits of both models then."""
        work = self.work
        training = work.by_block or work.together
        if not training:
            return 0.0
        plan = training.plan
        goals = sum(self._pass(block, work.tokens, work.recipe.seqlen) for block in work.blocks)
        head = 2 * work.tokens * work.vocabulary * work.features / self.speed.products
        heads = plan.epochs * (1 + BACKWARD) * head * training.together
        trained = sum(self._trained(block, plan) for block in work.blocks)
        return goals * (training.dense_targets or training.together) + heads + trained

    def saving(self) -> float:
        """Packing, writing, and checksums."""
        work = self.work
        written = WRITTEN * work.kept_bytes * (2 if work.together else 1)
        return written / self.speed.hashing + CHECKED * work.parameters * self.size / self.speed.memory
