import errno
import os
import sys

import pytest
import torch

from sparlow.errors import RunError
from sparlow.model.forward import tensor_file
from sparlow.model.forward.activation_store import ActivationStore
from sparlow.model.forward.tensor_file import TensorFile

TENSORS = [
    torch.randn(2, 3),
    torch.randn(4, 3).bfloat16(),
    torch.randn(3, 2, 5).half().movedim(0, 2),
    torch.tensor([True, False]),
    torch.arange(5),
    torch.tensor(7.0),
    torch.empty(0, 4),
    torch.randn(2, 2, dtype=torch.complex64),
]


def test_tensors_come_back_in_any_order(tmp_path):
    file = TensorFile(tmp_path / "made")
    entries = [file.append(t) for t in TENSORS]
    for tensor, entry in reversed(list(zip(TENSORS, entries, strict=True))):
        found = file.read(entry)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found, tensor)
        found.zero_()  # is the caller's own
        assert torch.equal(file.read(entry), tensor)


class _Slow:
    """A file that takes and gives a few bytes at a time, as systems do with gigabytes."""

    def __init__(self, file):
        self._file = file

    def write(self, content):
        return self._file.write(content[:3])

    def readinto(self, content):
        return self._file.readinto(content[:5])

    def __getattr__(self, name):
        return getattr(self._file, name)


def test_what_is_read_and_written_in_parts_is_whole(tmp_path):
    file = TensorFile(tmp_path)
    file._file = _Slow(file._file)
    entries = [file.append(t) for t in TENSORS]
    assert all(torch.equal(file.read(entry), t) for entry, t in zip(entries, TENSORS, strict=True))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="files without a name are Linux's")
def test_a_file_has_no_name_that_a_killed_process_could_leave(tmp_path):
    store = ActivationStore(tmp_path / "hidden", TENSORS)
    assert not list((tmp_path / "hidden").iterdir())
    assert store.fresh().place == store.place
    assert torch.equal(store[0], TENSORS[0])


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    file = TensorFile(tmp_path)

    class Full:
        def seek(self, _):
            pass

        def write(self, _):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file._file = Full()
    with pytest.raises(RunError, match=r"Cannot write hidden states into .*No space left.* Free disk space"):
        file.append(TENSORS[0])

    def none(**_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tensor_file.tempfile, "TemporaryFile", none)
    with pytest.raises(RunError, match="Cannot write hidden states into"):
        ActivationStore("disk")
