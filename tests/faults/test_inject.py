"""The byte killer cuts at the very byte, whatever way of writing is used, and tells a torn write from a whole one."""

import gzip
import io
import json
import os
import shutil
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.publish import whole_file
from tests.faults.inject import Watched, command_killed_after, killed_after

pytestmark = pytest.mark.faults

CONTENT = bytes(range(256)) * 100  # 25,600 bytes: more than two buffers


def by_path(folder: Path) -> None:
    (folder / "x").write_bytes(CONTENT)


def by_small_writes(folder: Path) -> None:
    with open(folder / "x", "wb") as file:
        for start in range(0, len(CONTENT), 100):
            file.write(CONTENT[start : start + 100])


def unbuffered(folder: Path) -> None:
    with io.FileIO(folder / "x", "w") as file:
        view = memoryview(CONTENT)
        while view:
            view = view[file.write(view) :]


def by_descriptor(folder: Path) -> None:
    descriptor = os.open(folder / "x", os.O_WRONLY | os.O_CREAT)
    assert os.write(descriptor, CONTENT[:1000]) == 1000
    assert os.pwrite(descriptor, CONTENT[1000:2000], 1000) == 1000
    os.lseek(descriptor, 2000, os.SEEK_SET)
    assert os.writev(descriptor, [CONTENT[2000:3000], CONTENT[3000:]]) == 23_600


def by_fdopen(folder: Path) -> None:
    descriptor, name = tempfile.mkstemp(dir=folder)
    with os.fdopen(descriptor, "wb") as file:
        file.write(CONTENT)
    os.rename(name, folder / "x")


def by_copy(folder: Path) -> None:
    source = folder.parent / "source"
    source.write_bytes(CONTENT)
    shutil.copyfile(source, folder / "x")


def by_copy_range(folder: Path) -> None:
    source = folder.parent / "source"
    source.write_bytes(CONTENT)
    with open(source, "rb") as read, open(folder / "x", "wb") as write:
        left = len(CONTENT)
        while left:
            left -= os.copy_file_range(read.fileno(), write.fileno(), left)


def by_tofile(folder: Path) -> None:
    """numpy writes real files from C; a file it takes for an abstract one goes through Python."""
    with open(folder / "x", "wb") as file:
        np.save(file, np.frombuffer(CONTENT, np.uint8))


WAYS: list[Callable[[Path], None]] = [
    by_path,
    by_small_writes,
    unbuffered,
    by_descriptor,
    by_fdopen,
    by_copy,
    by_copy_range,
    by_tofile,
]


@pytest.mark.parametrize("write", WAYS, ids=lambda way: way.__name__)
def test_every_way_of_writing_is_cut_at_the_very_byte(write: Callable[[Path], None], tmp_path: Path) -> None:
    folder = tmp_path / "watched"
    folder.mkdir()
    whole = killed_after(lambda: write(folder), Watched(folder), None)
    assert whole.finished, whole.stderr
    expected = (folder / "x").read_bytes()
    assert whole.written_bytes == len(expected) >= len(CONTENT)
    for after_bytes in (0, 1, 8191, 20_000, len(expected)):
        shutil.rmtree(folder)
        folder.mkdir()
        outcome = killed_after(lambda: write(folder), Watched(folder), after_bytes)
        assert outcome.killed
        assert outcome.written_bytes == after_bytes
        (left,) = folder.iterdir()
        assert left.read_bytes() == expected[:after_bytes]


def test_buffers_are_not_flushed_and_nothing_is_cleaned_up(tmp_path: Path) -> None:
    def work() -> None:
        try:
            with (
                open(tmp_path / "first", "wb") as first,
                open(tmp_path / "second", "wb", buffering=0) as second,
            ):
                first.write(b"in a buffer")
                second.write(b"cut here")
        finally:
            (tmp_path / "cleaned").touch()

    assert killed_after(work, Watched(tmp_path), 3).killed
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"first": b"", "second": b"cut"}


def test_archives_are_counted_whole(tmp_path: Path) -> None:
    """tarfile keeps `open` under a name of its own, gzip and zipfile seek: the count is the files' size."""

    def work() -> None:
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            member = tarfile.TarInfo("x")
            member.size = len(CONTENT)
            tar.addfile(member, io.BytesIO(CONTENT))
        with gzip.open(tmp_path / "b.gz", "wb") as packed:
            packed.write(CONTENT)
        with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
            archive.writestr("x", CONTENT)
        with open(tmp_path / "d.json", "w") as file:
            json.dump({"text": "é" * 5000}, file, ensure_ascii=False)

    outcome = killed_after(work, Watched(tmp_path), None)
    assert outcome.finished, outcome.stderr
    sizes = {path.suffix: path.stat().st_size for path in tmp_path.iterdir()}
    # A zip member's header is written twice: once before its sizes are known.
    assert outcome.written_bytes - sum(sizes.values()) == 31
    assert tarfile.open(tmp_path / "a.tar").extractfile("x").read() == CONTENT  # type: ignore[union-attr]


def test_only_watched_writes_count(tmp_path: Path) -> None:
    def work() -> None:
        (tmp_path / "a.log").write_bytes(bytes(500))
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "b.tar").write_bytes(bytes(70))
        (tmp_path / "insider").write_bytes(bytes(9))
        print("said to the terminal")

    outcome = killed_after(work, Watched(tmp_path / "in"), None)
    assert (outcome.written_bytes, outcome.stdout) == (70, "said to the terminal\n")
    shutil.rmtree(tmp_path / "in")
    assert killed_after(work, Watched(tmp_path, "*.tar"), 70).killed
    assert not (tmp_path / "in" / "b.tar").stat().st_size < 70
    assert killed_after(
        lambda: (tmp_path / "a.log").write_bytes(b"xyz"), Watched(tmp_path / "a.log"), 2
    ).killed
    assert (tmp_path / "a.log").read_bytes() == b"xy"


def replace_naively(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def replace_whole(path: Path, content: bytes) -> None:
    with whole_file(path) as beside:
        beside.write_bytes(content)


@pytest.mark.parametrize(("replace", "torn"), [(replace_naively, 20), (replace_whole, 0)])
def test_sweep_tells_a_torn_write_from_a_whole_one(
    replace: Callable[[Path, bytes], None], torn: int, tmp_path: Path
) -> None:
    """21 kills, at each byte of 20: the naive writer leaves neither old nor new in all but the last of them."""
    path = tmp_path / "manifest.json"
    old, new = b"o" * 30, b"n" * 20
    seen = 0
    for after_bytes in range(21):
        path.write_bytes(old)
        outcome = killed_after(lambda: replace(path, new), Watched(tmp_path), after_bytes)
        assert outcome.killed
        seen += path.read_bytes() not in (old, new)
    assert seen == torn


def test_failing_work_shows_its_traceback(tmp_path: Path) -> None:
    outcome = killed_after(lambda: json.loads("{"), Watched(tmp_path), 10)
    assert (outcome.exit_code, outcome.written_bytes) == (1, 0)
    assert "JSONDecodeError" in outcome.stderr


def test_work_that_hangs_is_ended(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match=r"after 0\.2 s"):
        killed_after(lambda: time.sleep(60), Watched(tmp_path), None, timeout_seconds=0.2)


def test_parent_writes_as_before(tmp_path: Path) -> None:
    real = os.write
    killed_after(lambda: None, Watched(tmp_path), 0)
    assert os.write is real
    (tmp_path / "x").write_bytes(CONTENT)
    assert isinstance(open(tmp_path / "x", "rb"), io.BufferedReader)


@pytest.mark.parametrize("form", ["code", "script", "module"])
def test_command_is_cut_at_the_very_byte(form: str, tmp_path: Path) -> None:
    folder = tmp_path / "watched"
    folder.mkdir()
    source = "import pathlib, sys\nassert __name__ == '__main__'\npathlib.Path(sys.argv[1], 'x').write_bytes(b'12345678')"
    script = tmp_path / "program.py"
    script.write_text(source)
    (folder.parent / "in.json").write_text('{"a": 1}')
    argv = {
        "code": ["-c", source, str(folder)],
        "script": [str(script), str(folder)],
        "module": ["-m", "json.tool", "--compact", str(tmp_path / "in.json"), str(folder / "x")],
    }[form]
    whole = command_killed_after(argv, Watched(folder), None)
    assert whole.finished, whole.stderr
    expected = (folder / "x").read_bytes()
    assert whole.written_bytes == len(expected) == 8
    cut = command_killed_after(argv, Watched(folder), 5)
    assert cut.killed
    assert cut.written_bytes == 5
    assert (folder / "x").read_bytes() == expected[:5]


def test_failing_command_tells_its_exit_code(tmp_path: Path) -> None:
    outcome = command_killed_after(["-c", "raise SystemExit(3)"], Watched(tmp_path), 1)
    assert (outcome.exit_code, outcome.killed) == (3, False)
    assert sys.executable not in outcome.stderr
