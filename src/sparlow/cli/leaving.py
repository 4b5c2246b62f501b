"""What one of several processes does otherwise: who of them speaks, and how each ends, for others may wait for it."""

import os
import sys
from typing import NoReturn


def alone() -> bool:
    """Whether this process is the only one of its run, not one of those that torchrun started."""
    return os.environ.get("WORLD_SIZE", "1") == "1"


def speaks() -> bool:
    """Whether this process tells the user what goes on, and writes what he asks for: the first of several."""
    return alone() or os.environ.get("RANK", "0") == "0"


def tell_others(why: str) -> None:
    """Tell the other processes, if they wait for this one at the start, why it will not come: its last words."""
    if not alone():
        from sparlow.joining import will_not_come

        sys.stderr.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # torch has many for each look in vain
        will_not_come(why)


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
