"""Exit records: written by the rank's parent whatever kills the rank, and judged without srun's own code."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.supervisor.exits import RANK_PARENT, Ending, Exit, first_failure, judge, open_records, read_exits
from pipeline.paths import RunPaths


def parent(folder: Path, *command: str, rank: int = 3) -> subprocess.Popen[bytes]:
    """Start `command` under the parent that srun starts."""
    environment = os.environ | {
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": "0",
        "SLURMD_NODENAME": "gpu-07",
        "LDM_LOCAL": str(folder / "local"),
        "TORCH_EXTENSIONS_DIR": str(folder / "local" / "torch"),
        "TRITON_CACHE_DIR": str(folder / "local" / "triton"),
    }
    (folder / "records").mkdir(exist_ok=True)
    words = ["bash", "-c", RANK_PARENT, "rank", str(folder / "records"), *command]
    return subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, process_group=0)


@pytest.mark.parametrize(
    ("body", "code"), [("raise SystemExit(5)", 5), ("import os; os.kill(os.getpid(), 9)", 137), ("", 0)]
)
def test_the_end_of_a_rank_is_on_record_even_if_it_is_killed(tmp_path: Path, body: str, code: int) -> None:
    process = parent(tmp_path, sys.executable, "-S", "-c", body)
    process.communicate(timeout=20)
    assert process.returncode == code
    (record,) = read_exits(tmp_path / "records")
    assert (record.rank, record.code, record.node) == (3, code, "gpu-07")
    assert abs(record.time - time.time()) < 20
    assert not (tmp_path / "local").exists(), "the attempt's folder is gone from the node"


def test_a_signal_to_the_whole_group_is_the_ranks_to_handle(tmp_path: Path) -> None:
    body = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGUSR2, lambda *a: sys.exit(75))\n"
        "open(sys.argv[1], 'w').close(); time.sleep(30)"
    )
    process = parent(tmp_path, sys.executable, "-S", "-c", body, str(tmp_path / "up"))
    while not (tmp_path / "up").exists():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGUSR2)
    process.communicate(timeout=20)
    assert process.returncode == 75
    assert [record.code for record in read_exits(tmp_path / "records")] == [75]


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    """The rank loads code from it."""
    (tmp_path / "local").symlink_to(tmp_path)
    process = parent(tmp_path, "true")
    _, said = process.communicate(timeout=20)
    assert (process.returncode, b"not ours" in said) == (1, True)


def ends(*codes: int | None) -> list[Exit]:
    return [Exit(rank, code, f"n{rank}", 100.0 + rank) for rank, code in enumerate(codes) if code is not None]


@pytest.mark.parametrize(
    ("codes", "stop_asked", "ending", "code"),
    [
        ((0, 0), False, Ending.DONE, 0),
        ((0, None), False, Ending.CRASHED, 1),
        ((75, 75), False, Ending.STOPPED, 75),
        ((75, 0), True, Ending.STOPPED, 75),
        ((75, 140), True, Ending.STOPPED, 75),
        ((143, 143), True, Ending.STOPPED, 75),
        ((143, 143), False, Ending.CRASHED, 143),
        ((75, None), True, Ending.CRASHED, 1),
        ((75, 1), True, Ending.CRASHED, 1),
        ((1, 2), False, Ending.FINAL, 2),
        ((1, 5, 137), False, Ending.FINAL, 5),
        ((1, 6), True, Ending.FINAL, 6),
        ((1, 137), False, Ending.CRASHED, 137),
        ((None, None), False, Ending.CRASHED, 1),
    ],
)
def test_the_records_alone_say_how_an_attempt_ended(
    codes: tuple[int | None, ...], stop_asked: bool, ending: Ending, code: int
) -> None:
    verdict = judge(ends(*codes), len(codes), stop_asked=stop_asked)
    assert (verdict.ending, verdict.code) == (ending, code)


def test_the_killed_rank_is_named_not_the_one_that_lost_contact_a_moment_earlier() -> None:
    exits = [Exit(0, 1, "a", 10.0), Exit(1, 137, "b", 10.4), Exit(2, 139, "c", 12.0), Exit(3, 75, "d", 1.0)]
    first = first_failure(exits)
    assert first is not None
    assert (first.rank, str(first)) == (1, "rank 1 on b: killed by SIGKILL")


def test_records_of_old_attempts_are_thinned_out(tmp_path: Path) -> None:
    run = RunPaths(tmp_path)
    for number in range(12):
        folder = open_records(run, f"7.0.{number}", keep=4)
        os.utime(folder, (number, number))
    left = sorted(int(entry.name.rpartition(".")[2]) for entry in (run.supervisor / "exits").iterdir())
    assert left == [7, 8, 9, 10, 11]
