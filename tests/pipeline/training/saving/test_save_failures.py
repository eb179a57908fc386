"""Saves that fail, are overtaken, or are killed: the checkpoints before them stay, and what failed is said."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import CheckpointError
from pipeline.publish import write_json
from pipeline.training.saving import commit as commit_module
from pipeline.training.saving import save as save_module
from pipeline.training.saving.checkpoint import newest_checkpoint
from pipeline.training.saving.fence import FENCE_NAME
from pipeline.training.saving.manifest import committed
from pipeline.training.saving.state import RunState
from tests.faults.inject import ByteOutcome, Watched, killed_after
from tests.faults.tmpfs import SmallTmpfs, small_tmpfs
from tests.pipeline.training.stand_ins import StandInFragments, stand_in_checkpoints, state_after

__all__ = ["small_tmpfs"]

PLACES = {"write_stretches": save_module, "write_json": commit_module, "fsync_folder": commit_module}


@pytest.mark.covers("F22", "F23")
@pytest.mark.parametrize("place", PLACES)
def test_a_failed_save_leaves_the_old_ones_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    fragments = StandInFragments()
    checkpoints, _ = stand_in_checkpoints(tmp_path, fragments)
    checkpoints.resume()
    assert checkpoints.save(state_after(0))
    fragments.updates = 1

    def full(path: Path, *rest: Any) -> Any:
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(PLACES[place], place, full)
        assert not checkpoints.save(state_after(1))
    assert "step-00000001: not saved: rank 0: No space left on device: " in caplog.text
    assert str(tmp_path) in caplog.text and "step-00000000 is intact; failure 1 of 3" in caplog.text
    assert [path.name for path in committed(tmp_path)] == ["step-00000000"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert checkpoints.save(state_after(1)) and newest_checkpoint(tmp_path).name == "step-00000001"


@pytest.mark.covers("F22")
def test_three_failures_in_a_row_end_the_run_and_a_success_forgives_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fragments = StandInFragments()
    checkpoints, _ = stand_in_checkpoints(tmp_path, fragments)
    checkpoints.resume()

    class Usage:
        free = 100

    def fail(times: int) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: Usage)
            for _ in range(times):
                assert not checkpoints.save(RunState())

    fail(2)
    assert checkpoints.save(RunState())
    fail(2)
    with pytest.raises(CheckpointError, match=r"No space left on device.*failure 3 of 3"):
        fail(1)
    assert newest_checkpoint(tmp_path).name == "step-00000000"


@pytest.mark.covers("F35")
def test_a_stale_attempt_publishes_nothing(tmp_path: Path) -> None:
    fragments = StandInFragments()
    old, _ = stand_in_checkpoints(tmp_path, fragments, attempt="old")
    old.resume()
    old.save(RunState())
    new, _ = stand_in_checkpoints(tmp_path, StandInFragments(), attempt="new")
    new.resume()
    fragments.updates = 1
    with pytest.raises(CheckpointError, match="attempt new has taken over this run; this one, old,"):
        old.save(state_after(1))
    assert [path.name for path in committed(tmp_path)] == ["step-00000000"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_an_attempt_that_goes_stale_while_it_writes_publishes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, _ = stand_in_checkpoints(tmp_path, StandInFragments(), attempt="old")
    old.resume()
    plain = save_module.write_stretches

    def overtaken(path: Path, stretches: Any, *rest: Any) -> Any:
        written = plain(path, stretches, *rest)
        write_json(tmp_path / FENCE_NAME, {"attempt": "new"})
        return written

    monkeypatch.setattr(save_module, "write_stretches", overtaken)
    with pytest.raises(CheckpointError, match="attempt new has taken over"):
        old.save(RunState())
    assert committed(tmp_path) == []


@pytest.mark.faults
@pytest.mark.covers("F19")
def test_killed_at_any_byte_of_a_save_the_one_before_is_loaded(tmp_path: Path) -> None:
    """SIGKILL after every so many bytes written: the newest is the old one until the rename, then the new one."""
    fragments = StandInFragments()
    checkpoints, _ = stand_in_checkpoints(tmp_path / "origin", fragments)
    checkpoints.resume()
    checkpoints.save(RunState())
    fragments.step()

    def work(folder: Path) -> None:
        again, _ = stand_in_checkpoints(folder, fragments)
        again.save(RunState(step=1, samples=8))

    def trial(number: int, after_bytes: int | None) -> tuple[ByteOutcome, Path]:
        folder = tmp_path / f"trial-{number}"
        shutil.copytree(tmp_path / "origin", folder)
        return killed_after(lambda: work(folder), Watched(folder), after_bytes), folder

    whole, folder = trial(0, None)
    assert whole.exit_code == 0, whole.stderr
    assert newest_checkpoint(folder).name == "step-00000001" and whole.written_bytes > 1500
    for number, after_bytes in enumerate(
        range(0, whole.written_bytes + 1, whole.written_bytes // 24), start=1
    ):
        outcome, folder = trial(number, after_bytes)
        assert outcome.killed
        published = after_bytes > whole.written_bytes - len(
            "step-00000001\n"
        )  # `latest` comes after the commit.
        assert newest_checkpoint(folder).name == f"step-0000000{int(published)}", after_bytes
        # The next attempt cleans up and saves.
        again, _ = stand_in_checkpoints(folder, StandInFragments(seed=9), attempt="a2")
        resumed = again.resume()
        assert resumed is not None and resumed[0].step == int(published)
        assert [path.name for path in folder.iterdir() if path.name.startswith((".", "damaged"))] == []


@pytest.mark.faults
@pytest.mark.covers("F23")
def test_a_disk_without_names_or_without_the_right_to_write(
    small_tmpfs: SmallTmpfs, caplog: pytest.LogCaptureFixture
) -> None:
    """Inodes run out, and then the file system is remounted read-only under the run."""
    fragments = StandInFragments()
    folder = small_tmpfs(16 * 2**20, 14)
    checkpoints, _ = stand_in_checkpoints(folder, fragments)
    checkpoints.resume()
    assert checkpoints.save(RunState())
    fillers = []
    for number in range(14):
        try:
            fillers.append(folder / f"filler-{number}")
            fillers[-1].touch()
        except OSError:
            break
    fragments.updates = 1
    assert not checkpoints.save(state_after(1))
    assert "step-00000001: not saved: rank 0: No space left on device: " in caplog.text
    assert "and 0 names free" in caplog.text and "step-00000000 is intact" in caplog.text
    for filler in fillers:
        filler.unlink(missing_ok=True)
    assert checkpoints.save(state_after(1))
    fragments.updates = 2
    remount = ["mount", "-o", "remount,{}", str(folder)]
    subprocess.run([part.format("ro") for part in remount], check=True, timeout=60)
    assert not checkpoints.save(state_after(2))
    assert "Read-only file system" in caplog.text and "step-00000001 is intact" in caplog.text
    subprocess.run([part.format("rw") for part in remount], check=True, timeout=60)
    assert checkpoints.save(state_after(2)) and newest_checkpoint(folder).name == "step-00000002"


@pytest.mark.faults
@pytest.mark.covers("F22")
def test_a_disk_that_is_really_full(
    small_tmpfs: SmallTmpfs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once seen before anything is written, once in the middle of a file, where the check could not know."""
    fragments = StandInFragments(shapes={"w": (300, 300)})
    folder = small_tmpfs(2 * 1024 * 1024)
    checkpoints, _ = stand_in_checkpoints(folder, fragments)
    checkpoints.resume()
    assert not checkpoints.save(RunState())
    assert f"No space left on device: {folder} (needs 2488576 bytes; 20" in caplog.text
    monkeypatch.setattr(save_module, "HEADER_BYTES", 0)
    assert checkpoints.save(RunState())
    caplog.clear()

    class Usage:
        free = 10**12

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage)
    fragments.updates = 1
    assert not checkpoints.save(state_after(1))
    assert f"No space left on device: {folder}" in caplog.text and "step-00000000 is intact" in caplog.text
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
    assert newest_checkpoint(folder).name == "step-00000000"
