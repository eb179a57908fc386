"""Encode workers that are killed, stopped, doubled or many, and disks that are full: the data set is always the same.

`precompute_main` holds the crowds: processes without torch, forked from one that has loaded everything.
"""

import errno
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import PipelineError
from pipeline.latents.shard import ShardRecord, shard_path
from preprocessing.encoded import EncodedBatch
from preprocessing.refusals import OtherFingerprintError
from preprocessing.roster import Work, encode_shards
from preprocessing.sources import list_shards
from tests.faults.outcome import run_to_end
from tests.faults.tmpfs import SmallTmpfs
from tests.preprocessing.builders import (
    POISON,
    NumpyEncoder,
    encode_config,
    image_file,
    pairs,
    solid,
    three_shards,
    write_input,
)
from tests.preprocessing.encode_process import contents
from tests.requirements import require_root, require_tool

pytestmark = pytest.mark.faults
KILLS, WORKERS = 50, 200


@pytest.fixture
def memory_folder() -> Iterator[Path]:
    """A folder in memory where the machine has one: the crowd's 6,000 files are synced one by one."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


def crowd(case: str, folder: Path, number: int = 0) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.faults.precompute_main", case, str(folder), str(number)]
    outcome = run_to_end(command, timeout_seconds=300)
    assert outcome.finished, outcome.stderr
    found: dict[str, Any] = json.loads(outcome.stdout)
    return found


def encode(source: Path, out: Path, encoder: NumpyEncoder | None = None, **changes: Any) -> Any:
    return encode_shards(Work(list_shards(source), out), encoder or NumpyEncoder(), encode_config(**changes))


@pytest.mark.covers("F43")
def test_killed_at_random_instants(memory_folder: Path) -> None:
    found = crowd("kills", memory_folder, KILLS)
    assert found["kills"] == KILLS and found["same"] and found["left"] == []
    assert found["in_the_middle"] > KILLS // 4


@pytest.mark.covers("F43")
def test_a_worker_that_slept_past_its_lease_changes_nothing(memory_folder: Path) -> None:
    found = crowd("stopped", memory_folder)
    assert len(found["held"]) == 1, "it was stopped in the middle of a shard"
    assert found["waited"] >= 1.0, "the other one waited for the lease to run out"
    assert found["codes"] == {"other": 0, "sleeper": 0}
    assert found["same"] and found["untouched"] and found["left"] == []


@pytest.mark.covers("F43")
def test_two_full_sets_of_workers_on_one_output(memory_folder: Path) -> None:
    found = crowd("two_sets", memory_folder, 3)
    assert found == {"codes": [0] * 6, "same": True, "left": []}


@pytest.mark.covers("F43", "F45")
def test_two_hundred_workers_encode_every_shard_once(memory_folder: Path) -> None:
    found = crowd("crowd", memory_folder, WORKERS)
    assert found == {
        "workers": WORKERS,
        "shards": 10 * WORKERS,
        "encoded": 10 * WORKERS,
        "failed": 0,
        "same": True,
        "left": [],
    }


@pytest.mark.covers("F45")
def test_more_workers_than_shards(tmp_path: Path) -> None:
    source = write_input(tmp_path / "in", {"00000": pairs(["a", "b"])})
    for worker in (6, 0):
        work = Work(list_shards(source), tmp_path / "out", worker, 7)
        assert encode_shards(work, NumpyEncoder(), encode_config()).encoded == (worker == 6)


@pytest.mark.covers("F44")
def test_a_full_disk_keeps_what_is_finished_and_goes_on_with_room(
    small_tmpfs: SmallTmpfs, tmp_path: Path
) -> None:
    source = three_shards(tmp_path / "in")
    encode(source, tmp_path / "straight")
    out = small_tmpfs(72 * 1024)
    with pytest.raises(
        PipelineError, match=r"No space left on device \(0 MB free\); mend that and run the same"
    ):
        encode(source, out, shards_at_once=1)
    straight, found = contents(tmp_path / "straight"), contents(out)
    finished = {name for name in found if name.endswith(".json")}
    assert 0 < len(finished) < 3, "the disk was full between the first and the last shard"
    assert all(found[name] == straight[name] for name in found)
    subprocess.run([str(require_tool("mount")), "-o", "remount,size=4m", str(out)], check=True, timeout=60)
    again = encode(source, out)
    assert again.finished_before == len(finished) and contents(out) == straight


@pytest.mark.covers("F44")
def test_a_read_only_output_is_one_line(small_tmpfs: SmallTmpfs, tmp_path: Path) -> None:
    require_root()
    source, out = three_shards(tmp_path / "in"), small_tmpfs(1 << 20)
    subprocess.run([str(require_tool("mount")), "-o", "remount,ro", str(out)], check=True, timeout=60)
    with pytest.raises(PipelineError, match="Read-only file system") as caught:
        encode(source, out)
    assert "\n" not in str(caught.value) and str(out) in str(caught.value)


@pytest.mark.covers("F41")
def test_a_source_that_was_replaced_between_runs_is_refused(tmp_path: Path) -> None:
    source = three_shards(tmp_path / "in")
    encode(source, tmp_path / "out")
    tar = source / "00001.tar"
    content = bytearray(tar.read_bytes())
    text = content.index(b"picture number 100")
    content[text : text + 7] = b"Picture"
    tar.write_bytes(content)
    with pytest.raises(OtherFingerprintError, match=r"00001\.json: .*input\.sha256") as caught:
        encode(source, tmp_path / "out")
    assert "input.bytes" not in str(caught.value), "the same length: only the content tells"


@pytest.mark.covers("F42")
def test_nan_from_the_encoder_is_rejected_and_counted(tmp_path: Path) -> None:
    poison = [("bad.png", image_file(solid(POISON))), ("bad.txt", b"x")]
    source = write_input(tmp_path / "in", {"00000": [*pairs(["a", "b", "c"]), *poison, *pairs(["d"], 9)]})
    counts = encode(source, tmp_path / "out").counts
    assert (counts.read, counts.written, counts.rejected) == (5, 4, {"nonfinite_latent": 1})
    assert b"bad.latent" not in shard_path(tmp_path / "out", "00000", ".tar").read_bytes()


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


class Starving(NumpyEncoder):
    """Runs out of memory `times` times in a row at the second batch."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times, self.released = times, 0

    def release_memory(self) -> None:
        self.released += 1

    def encode(self, images: np.ndarray, captions: Any) -> EncodedBatch:
        if len(self.batches) == 1 and self.times:
            self.times -= 1
            raise OutOfMemoryError("CUDA out of memory")
        return super().encode(images, captions)


def test_an_out_of_memory_retry_is_in_the_marker_and_not_in_the_bytes(tmp_path: Path) -> None:
    source = three_shards(tmp_path / "in")
    encode(source, tmp_path / "straight")
    starving = Starving(times=1)
    encode(source, tmp_path / "out", starving, shards_at_once=1)
    retries = [
        ShardRecord.load(shard_path(tmp_path / "out", stem, ".json")).extra["out_of_memory_retries"]
        for stem in ("00000", "00001", "00002")
    ]
    assert retries == [1, 0, 0] and starving.released == 1
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


def test_out_of_memory_twice_stops_with_what_to_do(tmp_path: Path) -> None:
    source = three_shards(tmp_path / "in")
    with pytest.raises(PipelineError, match=r"twice on a batch of 4 pictures of 16x16; lower encode\.batch"):
        encode(source, tmp_path / "out", Starving(times=2), shards_at_once=1)
    assert contents(tmp_path / "out") == {}


def test_no_space_is_told_from_other_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EIO may go away by itself: it is not turned into advice, the scheduler decides."""
    source = three_shards(tmp_path / "in")

    def broken(*arguments: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("preprocessing.worker.write_shard", broken)
    with pytest.raises(OSError, match="Input/output error"):
        encode(source, tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
