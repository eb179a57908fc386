"""The commit under attack at every system call, in a process without torch: there is always one checkpoint to load."""

import shutil
import sys
from pathlib import Path

import pytest

from pipeline.training.saving.fence import Fence
from pipeline.training.saving.manifest import committed, damaged_files, rank_file, read_manifest, step_of
from tests.faults import commit_main
from tests.faults.strace import Call, failed_at, killed_at, syscalls_of

pytestmark = pytest.mark.faults
# In turn over the calls: the list of FAULTS that a file system answers with.
ERRORS = ("ENOSPC", "EIO", "EDQUOT", "EROFS", "EACCES")
WORDS = {
    "ENOSPC": "No space left on device",
    "EIO": "Input/output error",
    "EDQUOT": "Disk quota exceeded",
    "EROFS": "Read-only file system",
    "EACCES": "Permission denied",
}


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the checkpoints of steps 1 and 2, of which a save of step 3 removes the first."""
    folder = tmp_path_factory.mktemp("commit") / "origin"
    Fence(folder, "a1").take()
    for step in (1, 2):
        commit_main.save(folder, step)
    return folder


def command(folder: Path) -> list[str]:
    # No site packages: an interpreter starts in a third of the time, and the room needs none of them.
    return [sys.executable, "-S", "-B", "-m", "tests.faults.commit_main", str(folder), "3"]


def fresh(origin: Path) -> Path:
    folder = origin.with_name("present")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(origin, folder)
    return folder


def valid_steps(folder: Path) -> list[int]:
    """Return the steps whose every byte is right, and whose bytes are those of the step."""
    steps = []
    for checkpoint in committed(folder):
        manifest = read_manifest(checkpoint)
        assert list(damaged_files(checkpoint, manifest, sorted(manifest["files"]))) == []
        step = step_of(checkpoint)
        assert (checkpoint / rank_file(0)).read_bytes().endswith(commit_main.payload(step))
        steps.append(step)
    return steps


def goes_on(folder: Path) -> None:
    """The next attempt cleans up, saves, and has what it should have."""
    Fence(folder, "a2").take()
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
    commit_main.save(folder, 4, attempt="a2")
    assert valid_steps(folder)[-1] == 4 and len(valid_steps(folder)) == 2
    assert (folder / "latest").read_text() == "step-00000004\n"


def calls_of(origin: Path) -> list[Call]:
    folder = fresh(origin)
    calls = syscalls_of(command(folder), folder)
    assert valid_steps(folder) == [2, 3]
    kinds = {call.name for call in calls}
    assert {"write", "fsync"} <= kinds and any("rename" in kind for kind in kinds) and len(calls) > 40
    return calls


@pytest.mark.covers("F19", "F20")
def test_killed_at_every_system_call_there_is_one_checkpoint_to_load(origin: Path) -> None:
    """Until the rename the newest is step 2, from then on step 3; never a damaged one under a checkpoint's name."""
    newest = []
    for call in calls_of(origin):
        folder = fresh(origin)
        outcome = killed_at(command(folder), call)
        assert outcome.killed and outcome.struck is not None, call
        steps = valid_steps(folder)
        assert steps in ([1, 2], [1, 2, 3], [2, 3]), (call, steps)
        newest.append(steps[-1])
        goes_on(folder)
    assert newest == sorted(newest) and newest[0] == 2 and newest[-1] == 3


@pytest.mark.covers("F22", "F23")
def test_an_error_at_every_system_call_costs_that_save_at_most(origin: Path) -> None:
    """Full, quota, read-only, forbidden, I/O error: the system's words are told, and the older ones are intact."""
    told = 0
    for number, call in enumerate(calls_of(origin)):
        folder = fresh(origin)
        error = ERRORS[number % len(ERRORS)]
        outcome = failed_at(command(folder), call, error)
        steps = valid_steps(folder)
        assert steps in ([1, 2], [1, 2, 3], [2, 3]), (call, steps)
        said = outcome.stdout + outcome.stderr
        assert outcome.exit_code in (0, 1) and "Traceback" not in said, (call, said)
        if outcome.exit_code == 0:
            assert steps[-1] == 3, call
        else:
            assert WORDS[error] in said, (call, said)
            told += 1
        goes_on(folder)
    assert told > 10
