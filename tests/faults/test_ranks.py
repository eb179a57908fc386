"""The launcher returns what ranks return, names the one that failed first, and leaves no process behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.outcome import ROOT
from tests.faults.ports import EPHEMERAL_RANGE, reserved_port
from tests.faults.ranks import RankError, RanksTimeoutError, first_to_fail, run_ranks

pytestmark = [pytest.mark.faults, pytest.mark.distributed]

WORK = "tests.faults.rank_work:"
LIMIT_SECONDS = 60.0


def alive(pid: int) -> bool:
    """Whether the process runs: a zombie, which only waits to be reaped, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_results_come_in_the_order_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "7")
    args = {"word": "küche", "numbers": [0.1, 1e-300]}
    results = run_ranks(WORK + "told", 3, args, LIMIT_SECONDS, env={"LDM_ADDED": "yes"})
    assert [result["rank"] for result in results] == [0, 1, 2]
    assert [result["LOCAL_RANK"] for result in results] == ["0", "1", "2"]
    for result in results:
        assert (result["word"], result["numbers"]) == ("küche", [0.1, 1e-300])
        assert (result["WORLD_SIZE"], result["LOCAL_WORLD_SIZE"]) == ("3", "3")
        assert (result["MASTER_ADDR"], result["OMP_NUM_THREADS"]) == ("127.0.0.1", "1")
        assert (result["SLURM_PROCID"], result["LDM_ADDED"]) == (None, "yes")
        assert result["cwd"] == str(ROOT)
        assert not result["TORCH_EXTENSIONS_DIR"].startswith(str(Path.home()))
    assert len({result["MASTER_PORT"] for result in results}) == 1


def test_two_gloo_ranks_really_sum() -> None:
    results = run_ranks(WORK + "all_reduced", 2, {"value": 2.5}, LIMIT_SECONDS)
    assert results == [{"sum": 7.5, "backend": "gloo", "threads": 1}] * 2


def test_killed_gloo_rank_is_named_and_not_the_one_that_waited_for_it() -> None:
    with pytest.raises(RankError, match=r"^rank 1 of 2 failed first: killed by SIGKILL\n") as failed:
        run_ranks(WORK + "gloo_rank_killed", 2, {"victim": 1}, LIMIT_SECONDS)
    assert (failed.value.rank, failed.value.exit_code, failed.value.results) == (1, -signal.SIGKILL, {})


def test_dying_rank_is_waited_for_and_named_before_its_victims() -> None:
    """Rank 1's main thread is gone and another of its threads is not: no process has ended when rank 0 fails."""
    with pytest.raises(RankError, match=r"^rank 1 of 2 failed first: killed by SIGKILL\n") as failed:
        run_ranks(WORK + "dies_slowly", 2, {}, LIMIT_SECONDS)
    assert "  rank 0: exit code 1, ConnectionError('the consequence')" in str(failed.value)


@pytest.mark.parametrize(
    ("moments", "rank"),
    [
        ({0: 5.0, 1: 4.0}, 1),
        ({0: 4.0, 1: 5.0}, 0),
        ({0: 5.0, 3: None}, 3),
        ({1: None, 2: None}, 1),
        ({2: 9.0}, 2),
    ],
)
def test_first_to_fail(moments: dict[int, float | None], rank: int) -> None:
    assert first_to_fail(moments) == rank


def test_traceback_of_the_failing_rank_is_shown_and_the_others_end() -> None:
    begun = time.monotonic()
    with pytest.raises(RankError) as failed:
        run_ranks(WORK + "one_raises", 3, {"rank": 2, "others_seconds": 30.0}, LIMIT_SECONDS)
    assert time.monotonic() - begun < 20
    lines = str(failed.value).splitlines()
    assert lines[0].startswith("rank 2 of 3 failed first: exit code 1, ValueError('latents of shard 00007")
    assert lines[1:3] == [f"  rank {rank}: was alive, killed by the launcher" for rank in (0, 1)]
    assert lines[-1] == "ValueError: latents of shard 00007 hold NaN on rank 2"
    assert any("in one_raises" in line for line in lines)
    assert "Traceback" in failed.value.stderr


def test_results_of_the_others_are_kept() -> None:
    with pytest.raises(RankError) as failed:
        run_ranks(WORK + "leaves", 2, {"how": "segfault"}, LIMIT_SECONDS)
    assert failed.value.exit_code == -signal.SIGSEGV
    assert "Segmentation fault" in failed.value.stderr
    assert failed.value.results == {0: "done"}


def test_earlier_failure_is_named_though_it_ends_later(tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"^rank 1 of 2 failed first: exit code 1, ValueError") as failed:
        run_ranks(WORK + "both_raise", 2, {"folder": str(tmp_path)}, LIMIT_SECONDS)
    assert failed.value.stderr.splitlines()[-1] == "ValueError: the cause"


@pytest.mark.parametrize(
    ("how", "exit_code", "text"),
    [
        ("without_result", 0, "exit code 0 without a result"),
        ("system_exit", 75, r"exit code 75, SystemExit\(75\)"),
    ],
)
def test_leaving_without_a_result_is_a_failure(how: str, exit_code: int, text: str) -> None:
    with pytest.raises(RankError, match=rf"^rank 1 of 2 failed first: {text}") as failed:
        run_ranks(WORK + "leaves", 2, {"how": how}, LIMIT_SECONDS)
    assert failed.value.exit_code == exit_code


def test_failure_after_the_result_is_a_warning() -> None:
    with pytest.warns(UserWarning, match="rank 1 gave its result, then: exit code 9"):
        results = run_ranks(WORK + "leaves", 2, {"how": "after_result"}, LIMIT_SECONDS)
    assert results == ["done", "done"]


def test_result_that_json_cannot_hold_is_a_failure() -> None:
    with pytest.raises(RankError, match="not JSON serializable"):
        run_ranks(WORK + "not_json", 1, {}, LIMIT_SECONDS)


def test_time_out_names_the_ranks_alive_and_shows_their_stacks(tmp_path: Path) -> None:
    with pytest.raises(RanksTimeoutError) as failed:
        run_ranks(WORK + "hangs", 3, {"ranks": [0, 2], "folder": str(tmp_path)}, timeout_seconds=3.0)
    assert failed.value.alive == [0, 2]
    assert failed.value.results == {1: "done"}
    assert "of 3 ranks these gave no result and are alive: [0, 2]" in str(failed.value)
    assert str(failed.value).count("in wait_for_a_shard_that_never_comes") == 2
    pids = [int(path.name.split("-")[1]) for path in tmp_path.iterdir()]
    assert len(pids) == 3 + 2
    deadline = time.monotonic() + 20  # A killed process that nobody waits for takes a moment to be gone.
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, [pid for pid in pids if alive(pid)]
        time.sleep(0.05)


def test_ranks_die_with_the_launcher(tmp_path: Path) -> None:
    code = "import sys; from tests.faults.ranks import run_ranks\n"
    code += f"run_ranks('{WORK}hangs', 2, {{'ranks': [0, 1], 'folder': sys.argv[1]}}, 60.0)"
    own_folder = os.environ | {"TMPDIR": str(tmp_path)}  # A killed launcher cannot remove its folder.
    launcher = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=own_folder)
    wait_until(lambda: len(list(tmp_path.glob("child-*"))) == 2, 20)
    ranks = [int(path.name.split("-")[1]) for path in tmp_path.glob("[01]-*")]
    children = [int(path.name.split("-")[1]) for path in tmp_path.glob("child-*")]
    try:
        assert all(alive(pid) for pid in ranks)
        os.kill(launcher.pid, signal.SIGKILL)
        launcher.wait()
        wait_until(lambda: not any(alive(pid) for pid in ranks), 5)
    finally:
        # The ranks' own children are theirs to end, and these ranks had no time to.
        for pid in [*children, *filter(alive, ranks)]:
            os.kill(pid, signal.SIGKILL)


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline_seconds = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline_seconds, f"not so within {seconds} s"
        time.sleep(0.02)


def test_ports_are_free_apart_and_outside_the_ephemeral_range() -> None:
    low, high = map(int, EPHEMERAL_RANGE.read_text().split())
    with reserved_port() as first, reserved_port() as second:
        assert first != second
        for port in (first, second):
            assert 1024 <= port <= 65535
            assert not low <= port <= high


def test_reserved_port_is_not_given_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    with reserved_port() as port:
        monkeypatch.setattr("tests.faults.ports._outside_ephemeral_range", lambda: [port])
        with pytest.raises(OSError, match="no free port among 1"), reserved_port():
            pass
    with reserved_port() as again:
        assert again == port
