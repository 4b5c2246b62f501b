"""Run one block on all of its inputs."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparlow.distributed import ALONE, Processes
from sparlow.errors import RunError
from sparlow.finite import all_finite
from sparlow.model.forward.activation_store import ActivationStore
from sparlow.model.forward.calls import BlockCalls, Call
from sparlow.model.forward.compressible import CompressibleWeight, compressible


@dataclass(frozen=True)
class BlockPass:
    """A block with everything that is needed to run it on the calibration text.

    Attributes:
        block: A decoder block, with its weights.
        calls: How it is called.
        hidden: Its inputs, one (windows, seqlen, …) tensor for each micro-batch. Each process holds its own windows.
        label: Its name in the model, for errors.
        number: Its number in the decoder.
        processes: The processes that share the text.
    """

    block: nn.Module
    calls: BlockCalls
    hidden: ActivationStore
    label: str = "block"
    number: int = 0
    processes: Processes = ALONE

    @property
    def device(self) -> torch.device:
        """Where the block is."""
        return next(self.block.parameters()).device

    @property
    def weights(self) -> dict[str, CompressibleWeight]:
        """What can be compressed in the block, by the name within it."""
        return compressible(self.block)

    def layer_name(self, name: str) -> str:
        """Return the full name of a layer of the block."""
        return f"{self.label}.{name}"

    def call(self, i: int) -> Call:
        """Return the arguments of the block for micro-batch i. Use them for one run only."""
        return self.calls.at(i, self.device, self.hidden.shared(i))


def run_block(block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    """Return the hidden state (windows, seqlen, …) that the block computes, on the block's device, with gradients.

    Args:
        block: With its weights.
        hidden: (windows, seqlen, …), on any device.
        call: For these windows, on the block's device.
    """
    state = to_block(hidden.to(next(block.parameters()).device), call.axis)
    return from_block(hidden_state(block(state, *call.args, **call.kwargs)), call.axis)


def pass_through(through: BlockPass, *, check: bool = False) -> ActivationStore:
    """Return the outputs of a block for all of its inputs, stored in the same place as these.

    Args:
        through: The block and what enters it.
        check: Stop at an output that is not finite.

    Raises:
        RunError: An output is not finite.
    """
    outputs = through.hidden.fresh()
    for i, x in enumerate(through.hidden):
        if not len(x):
            outputs.append(x)
            continue
        call = through.call(i)
        y = run_block(through.block, x, call)
        if check and not all_finite(y):
            raise RunError(
                f"{through.label}: the block's output is not finite. Raise --damping, or use --dtype float32."
            )
        outputs.append(y, call.written())
    return outputs


def hidden_state(output: Any) -> Tensor:  # noqa: ANN401 - what a foreign forward returns
    """Return the hidden state in what a block returned."""
    state: Tensor = output[0] if isinstance(output, tuple | list) else output
    return state


def to_block(hidden: Tensor, axis: int) -> Tensor:
    """Turn (windows, seqlen, …) into the layout of a block: windows in dimension ``axis``, tokens in the next."""
    return hidden.movedim((0, 1), (axis, axis + 1)) if axis else hidden


def from_block(state: Tensor, axis: int) -> Tensor:
    """Undo ``to_block``."""
    return state.movedim((axis, axis + 1), (0, 1)) if axis else state
