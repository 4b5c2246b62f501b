"""Gradients of several processes are added up a bucket at a time."""

import pytest
import torch
from torch import nn

from sparlow.distributed import Processes
from sparlow.model.training import loop
from sparlow.model.training.loop import MicroBatches


class Twins(Processes):
    """One of two processes, of which the other always has the same."""

    def __init__(self):
        super().__init__(0, 2)
        self.sizes = []

    def all_reduce(self, tensor):
        if tensor.dtype == torch.float32:
            self.sizes.append(tensor.numel())
        return tensor.mul_(2)


@pytest.mark.parametrize(("bucket", "sizes"), [(2**26, [39]), (40, [9, 20, 10]), (4, [3, 6, 20, 4, 6])])
def test_gradients_are_added_up_in_buckets_that_are_no_larger_than_they_may_be(bucket, sizes, monkeypatch):
    monkeypatch.setattr(loop, "BUCKET", bucket)
    shapes = [(3,), (2, 3), (7,), (4, 5), (4,), (6,)]
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    gradients = [torch.randn(shape) for shape in shapes]
    gradients[2] = None  # neither has one
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = None if gradient is None else gradient.clone()
    twins = Twins()
    MicroBatches([], [], processes=twins).add_gradients(parameters)
    assert twins.sizes == sizes
    for p, gradient in zip(parameters, gradients, strict=True):
        assert (p.grad is None) if gradient is None else torch.equal(p.grad, 2 * gradient)
