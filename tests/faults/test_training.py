"""Real faults in the ranks of a real `ldm train` under the real launcher: who is named, what is left, what comes next.

These are full starts of the stack: tests/faults/test_reliability.py holds their number against the budget.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch.local import run_local
from pipeline.config_file import dump_config
from pipeline.training.health.heartbeat import read_heartbeats
from pipeline.training.saving.manifest import committed, read_manifest
from tests.distributed.cases import make_config, paths_of
from tests.distributed.dataset import build_dataset
from tests.faults.outcome import ROOT

pytestmark = [pytest.mark.faults, pytest.mark.distributed]

STEPS = 6
QUIET = {"LDM_QUIET": "1", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build_dataset(tmp_path / "latents", 30)
    return tmp_path


def command(folder: Path, fault: str, **sections: Any) -> list[str]:
    """Return the command of one rank of the run "run"."""
    config = folder / "run.yaml"
    if not config.exists():
        config.write_text(dump_config(make_config(folder, "run", **sections)))
    return [sys.executable, "-m", "tests.faults.training_main", fault, str(config)]


def start(folder: Path, fault: str, processes: int = 2, **sections: Any) -> int:
    """Run it to its end and return the launcher's exit code; nobody of it is left."""
    extensions = {"TORCH_EXTENSIONS_DIR": str(folder / "extensions"), "PYTHONPATH": str(ROOT)}
    code = run_local(
        command(folder, fault, **sections),
        processes,
        threads=1,
        environment={**os.environ, **QUIET, **extensions},
    )
    for beat in read_heartbeats(paths_of(folder, "run")):
        assert not Path(f"/proc/{beat.pid}").exists(), beat
    return code


@pytest.mark.covers("F1", "F2", "F3", "F19")
def test_killed_in_step_save_and_load_it_goes_on_to_the_same_end(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Rank 1 in step 4, rank 0 in the middle of a save, both while they load; then the run ends as if nothing was."""
    often = {"train": {"steps": STEPS, "checkpoint_every": 1, "keep_last": 100}}
    assert start(folder, "kill-1-in-step", **often) == 128 + signal.SIGKILL
    assert "rank 1 of 2 failed first: killed by SIGKILL" in capfd.readouterr().err
    checkpoints = paths_of(folder, "run").checkpoints
    assert committed(checkpoints), "nothing was saved before the kill"
    before = committed(checkpoints)
    assert start(folder, "kill-0-in-save") == 128 + signal.SIGKILL
    assert "rank 0 of 2 failed first: killed by SIGKILL" in capfd.readouterr().err
    assert committed(checkpoints) == before
    assert start(folder, "kill-all-in-load") == 128 + signal.SIGKILL
    assert committed(checkpoints) == before
    assert start(folder, "none") == 0
    (folder / "straight").mkdir()
    build_dataset(folder / "straight" / "latents", 30)
    assert start(folder / "straight", "none", **often) == 0
    last = [committed(paths_of(where, "run").checkpoints)[-1] for where in (folder, folder / "straight")]
    first, second = map(read_manifest, last)
    assert (first["step"], first["files"]) == (STEPS, second["files"])


@pytest.mark.covers("F11")
def test_a_stopped_rank_is_named_by_the_others_within_the_time_out(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    began_seconds = time.monotonic()
    assert start(folder, "stop-1", health={"collective_seconds": 10.0}) == 1
    assert time.monotonic() - began_seconds < 120
    said = capfd.readouterr().err
    (line,) = [line for line in said.splitlines() if "lost contact" in line]
    assert line.startswith("ldm: rank 0: lost contact") and "silent longest: rank 1 on " in line
    assert "rank 1 still runs and is killed" in said
    assert "Traceback" not in said


@pytest.mark.covers("F14")
def test_an_exception_on_one_rank_ends_all_with_its_traceback_and_one_line_of_the_others(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert start(folder, "raise-1") == 1
    said = capfd.readouterr().err
    assert said.count("Traceback") == 1
    assert "[rank 1] [rank1]: ValueError: latents of shard 00007 are not what they were" in said
    others = [line for line in said.splitlines() if line.startswith("ldm: rank 0: lost contact")]
    assert len(others) <= 1  # The launcher may end it before it has noticed.


@pytest.mark.covers("F16")
def test_memory_that_is_exhausted_is_one_line_that_says_what_to_lower(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert start(folder, "memory-1") == 1
    said = capfd.readouterr().err
    assert "[rank 1] ldm: rank 1: out of memory" in said and "lower engine.micro_batch, now 2" in said
    assert "Traceback" not in said


@pytest.mark.covers("F15")
def test_a_segfault_is_named_and_its_stack_is_in_the_log(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert start(folder, "segfault-1") == 128 + signal.SIGSEGV
    said = capfd.readouterr().err
    assert "rank 1 of 2 failed first: killed by SIGSEGV" in said
    assert "[rank 1] Fatal Python error: Segmentation fault" in said and "in read_null" in said


@pytest.mark.covers("F10")
def test_a_second_ctrl_c_in_the_save_leaves_at_once_and_publishes_nothing(folder: Path) -> None:
    train = {"train": {"steps": 100, "checkpoint_every": 1000}}
    argv = command(folder, "interrupt-twice", **train)
    process = subprocess.run(argv, cwd=ROOT, env=os.environ | QUIET, capture_output=True, timeout=120)
    assert process.returncode == -signal.SIGINT, process.stderr.decode()[-2000:]
    checkpoints = paths_of(folder, "run").checkpoints
    assert checkpoints.is_dir() and committed(checkpoints) == []
