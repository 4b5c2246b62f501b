import errno
import os
import stat

import pytest

from sparlow.errors import RunError
from sparlow.files import replacing, sync_folder


def refusing(monkeypatch, number, *, folders):
    """Let fsync fail for folders, or for files."""
    real = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == folders:
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_that_syncs_no_directories_takes_files(number, tmp_path, monkeypatch):
    """CIFS and several file systems in user space."""
    refusing(monkeypatch, number, folders=True)
    with replacing(tmp_path / "file") as partial:
        partial.write_text("whole")
    sync_folder(tmp_path)
    assert (tmp_path / "file").read_text() == "whole"


def test_a_fault_of_the_disk_is_one_also_for_a_directory(tmp_path, monkeypatch):
    refusing(monkeypatch, errno.EIO, folders=True)
    with pytest.raises(RunError, match="file"), replacing(tmp_path / "file") as partial:
        partial.write_text("whole")


def test_a_file_that_cannot_be_synced_is_a_fault(tmp_path, monkeypatch):
    refusing(monkeypatch, errno.EINVAL, folders=False)
    with pytest.raises(RunError, match="file"), replacing(tmp_path / "file") as partial:
        partial.write_text("whole")
    assert not (tmp_path / "file").exists()
