"""What an accelerator would be waited for: seen on the CPU, among what torch is asked to do."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# A number that Python looks at, or a result that is as large as the data say
WAITS = {
    "_local_scalar_dense",
    "_unique2",
    "is_nonzero",
    "masked_scatter",
    "masked_scatter_",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "unique_consecutive",
    "unique_dim",
}
_BY_INDEX = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class Counting(TorchDispatchMode):
    """Counts what torch is asked to do, and calls an index of bools what it is to a device: nonzero."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name in _BY_INDEX and any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]):
            name = "nonzero"
        if name == "repeat_interleave" and not isinstance(args[0], torch.Tensor):
            name = "repeat"
        self.found[name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def waits(self):
        """How often the device would be waited for, by what for."""
        return {name: count for name, count in self.found.items() if name in WAITS}
