"""Files that another machine wrote: a shared file system may show them late, cut short, or as they were before."""

import time
from pathlib import Path

from sparlow.errors import RunError, reason
from sparlow.files import resolve_inside, sha256
from sparlow.model.artefact.shards import ShardRecord

PAUSES = (0.1, 0.5, 2, 5, 10, 20, 30, 30)  # seconds between looks; in all more than the 60 of NFS's caches


def arrived(folder: Path, shard: ShardRecord) -> Path:
    """Return the path of a file once it is seen here as it was written elsewhere.

    Args:
        folder: Which both machines see.
        shard: The file's name, size and sum, as its writer knows them.

    Raises:
        RunError: It is still another after ``PAUSES``.
    """
    path = resolve_inside(folder, shard.file)
    for pause in PAUSES:
        if not wrong_with(path, shard):
            return path
        time.sleep(pause)
    wrong = wrong_with(path, shard)
    if wrong:
        raise RunError(
            f"The shard {shard.file} in {folder} is not what the first process wrote: {wrong}, {sum(PAUSES):.0f} "
            "seconds after it was finished. See that every machine has the same directory there, and repeat the "
            "command: it resumes from the last finished block."
        )
    return path


def wrong_with(path: Path, shard: ShardRecord) -> str:
    """Say how a file differs from what was written; nothing if it does not."""
    try:
        size = path.stat().st_size
        if size != shard.bytes:
            return f"it has {size} of {shard.bytes} bytes"
        return "" if sha256(path) == shard.sha256 else "it holds other bytes"
    except FileNotFoundError:
        return "it is not there"
    except OSError as problem:  # such as a handle that a server does not know any more
        return f"it cannot be read ({reason(problem)})"
