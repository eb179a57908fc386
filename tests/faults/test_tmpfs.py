"""The small tmpfs is full when it should be, and gone afterwards."""

import errno
import os
from pathlib import Path

import pytest

from tests.faults.tmpfs import SmallTmpfs, mounted_tmpfs

pytestmark = pytest.mark.faults


def test_it_takes_its_size_and_not_a_page_more(small_tmpfs: SmallTmpfs) -> None:
    folder = small_tmpfs(64 * 1024)
    (folder / "fits").write_bytes(bytes(64 * 1024))
    with pytest.raises(OSError) as refused:
        (folder / "too_much").write_bytes(b"x")
    assert refused.value.errno == errno.ENOSPC
    (folder / "fits").unlink()
    (folder / "again").write_bytes(bytes(32 * 1024))


def test_it_runs_out_of_names(small_tmpfs: SmallTmpfs) -> None:
    folder = small_tmpfs(1 << 20, inodes=4)
    with pytest.raises(OSError) as refused:
        for number in range(10):
            (folder / str(number)).touch()
    assert refused.value.errno == errno.ENOSPC
    assert sorted(os.listdir(folder)) == ["0", "1", "2"]


def test_each_call_mounts_a_folder_of_its_own(small_tmpfs: SmallTmpfs) -> None:
    first, second = small_tmpfs(8192), small_tmpfs(8192)
    (first / "full").write_bytes(bytes(8192))
    (second / "full").write_bytes(bytes(8192))
    assert os.path.ismount(first) and os.path.ismount(second)


def test_it_is_gone_even_while_a_file_is_open(tmp_path: Path) -> None:
    with mounted_tmpfs(tmp_path / "disk", 8192) as folder:
        held = open(folder / "held", "wb")
    try:
        assert not os.path.ismount(tmp_path / "disk")
        assert os.listdir(tmp_path / "disk") == []
    finally:
        held.close()
