"""How a process ends: at once where others may be waiting for it, or it for them."""

import os
import sys
from typing import NoReturn


def alone() -> bool:
    """Whether this process is the only one of its run, not one of those that torchrun started."""
    return os.environ.get("WORLD_SIZE", "1") == "1"


def leave(code: int) -> NoReturn:
    """End this process, whose contexts have all been left.

    If it is one of several and failed, nothing more is cleaned up: NCCL, closed as an interpreter exits,
    waits for processes that may never come, and torchrun would not see that this one has ended.
    """
    if code == 0 or alone():
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
