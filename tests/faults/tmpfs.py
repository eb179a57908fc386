"""A file system with so many bytes (or names) and no more, for real ENOSPC from the real kernel."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.requirements import leave_out, require_root, require_tool

SmallTmpfs = Callable[..., Path]


@contextmanager
def mounted_tmpfs(folder: Path, size_bytes: int, inodes: int | None = None) -> Iterator[Path]:
    """Yield `folder`, made if missing, as a tmpfs of `size_bytes` (rounded up to pages) and `inodes` names.

    Unmounted at the end even where a process still holds a file in it. Needs root and the right to mount; where
    either is missing the running test is left out.
    """
    require_root()
    mount, umount = require_tool("mount"), require_tool("umount")
    folder.mkdir(parents=True, exist_ok=True)
    options = f"size={size_bytes},mode=700" + (f",nr_inodes={inodes}" if inodes else "")
    command = [str(mount), "-t", "tmpfs", "-o", options, "ldm-test", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode != 0:
        leave_out(f"needs the right to mount a tmpfs: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run([str(umount), "--lazy", str(folder)], check=True, timeout=60)


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[SmallTmpfs]:
    """Return `small_tmpfs(size_bytes, inodes=None) -> Path`: a fresh, mounted folder for this test.

    `tests/faults` has it by its conftest; a test elsewhere imports this function by name.
    """
    with ExitStack() as mounts:

        def mount_one(size_bytes: int, inodes: int | None = None) -> Path:
            number = len(list(tmp_path.glob("small_tmpfs-*")))
            folder = tmp_path / f"small_tmpfs-{number}"
            return mounts.enter_context(mounted_tmpfs(folder, size_bytes, inodes))

        yield mount_one
