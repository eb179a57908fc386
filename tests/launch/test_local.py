"""Ranks on one machine: places, output, who is blamed, signals, and that nothing outlives the launcher."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch import local
from launch.local import run_local
from launch.nodes import place
from pipeline.errors import ToolError
from tests.launch.rank_programs import ROOT, is_alive, pids, rank_command, wait_until


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start run_local in a process of its own, and end it with all its ranks after the test."""
    started: list[subprocess.Popen[bytes]] = []

    def start(body: str, processes: int) -> subprocess.Popen[bytes]:
        code = (
            "import sys; from launch.local import run_local; "
            f"sys.exit(run_local(sys.argv[1:], {processes}, threads=1))"
        )
        command = [sys.executable, "-c", code, *rank_command(body, tmp_path)]
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        process.stderr.close()
    for file in tmp_path.glob("up-?"):  # ranks that outlived it are the failure, not a reason to wait
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(file.read_text()), signal.SIGKILL)


def test_every_rank_gets_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What an enclosing launcher left must not shine through.
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "old")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "9")
    body = "import json; json.dump(dict(os.environ), open(f'{HERE}/env-{RANK}.json', 'w'))"
    assert run_local(rank_command(body, tmp_path), 3, threads=2) == 0
    environments = [json.loads((tmp_path / f"env-{rank}.json").read_text()) for rank in range(3)]
    places = [place(environment) for environment in environments]
    assert [(p.rank, p.world_size, p.local_rank, p.local_world_size) for p in places] == [
        (rank, 3, rank, 3) for rank in range(3)
    ]
    assert {(p.master_address, p.source) for p in places} == {("127.0.0.1", "explicit")}
    assert len({p.master_port for p in places}) == 1
    assert {environment["OMP_NUM_THREADS"] for environment in environments} == {"2"}


def test_a_given_environment_replaces_the_own_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OF_THE_PARENT", "1")
    body = "sys.exit(0 if os.environ.get('GIVEN') == 'x y' and 'OF_THE_PARENT' not in os.environ else 9)"
    assert run_local(rank_command(body, tmp_path), 1, threads=1, environment={"GIVEN": "x y"}) == 0


def test_output_of_the_others_carries_their_rank(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = "print('out', flush=True); sys.stderr.write('a\\nlast without end')"
    assert run_local(rank_command(body, tmp_path), 3, threads=1) == 0
    output = capfd.readouterr()
    assert output.out == "out\n"
    lines = output.err.splitlines()
    for rank in (1, 2):
        mine = [line for line in lines if f"[rank {rank}] " in line]
        assert [line.split("] ", 1)[1] for line in mine] == ["out", "a", "last without end"]
    assert "a" in lines
    assert "last without end" in output.err


def test_much_output_arrives_whole(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = "for number in range(20000): print(f'line {number} ' + 'x' * 50)"
    assert run_local(rank_command(body, tmp_path), 2, threads=1) == 0
    output = capfd.readouterr()
    expected = [f"line {number} " + "x" * 50 for number in range(20000)]
    assert output.out.splitlines() == expected
    assert output.err.splitlines() == [f"[rank 1] {line}" for line in expected]


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 6, 75])
def test_the_code_of_all_ranks_passes_through(code: int, tmp_path: Path) -> None:
    assert run_local(rank_command(f"sys.exit({code})", tmp_path), 2, threads=1) == code


def test_the_first_failure_is_named_and_the_rest_ended(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    body = "meet('up'); sys.exit(3) if RANK == 1 else time.sleep(60)"
    started = time.monotonic()
    assert run_local(rank_command(body, tmp_path), 3, threads=1) == 3
    assert time.monotonic() - started < 20
    assert "ldm: rank 1 of 3 failed first: exit code 3" in capfd.readouterr().err
    assert not any(is_alive(pid) for pid in pids(tmp_path, "up", 3))


def test_a_rank_that_ignores_the_end_is_killed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "END_SECONDS", 0.2)
    body = (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); meet('up'); sys.exit(5) if RANK else time.sleep(60)"
    )
    assert run_local(rank_command(body, tmp_path), 2, threads=1) == 5
    errors = capfd.readouterr().err
    assert "rank 1 of 2 failed first: exit code 5" in errors
    assert "rank 0 still runs and is killed" in errors


@pytest.mark.covers("F1")
def test_the_killed_rank_is_blamed_not_its_peers(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    # Rank 0 loses its connection and leaves before the kernel has reported the killed one.
    body = """
meet('up')
if RANK == 0:
    sys.exit(1)
time.sleep(0.1)
os.kill(os.getpid(), signal.SIGKILL) if RANK == 1 else time.sleep(60)
"""
    assert run_local(rank_command(body, tmp_path), 3, threads=1) == 137
    errors = capfd.readouterr().err
    assert "rank 1 of 3 failed first: killed by SIGKILL (exit code 137)" in errors
    assert errors.count("failed first") == 1


@pytest.mark.covers("F15")
def test_a_segfault_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = "os.kill(os.getpid(), signal.SIGSEGV)"
    assert run_local(rank_command(body, tmp_path), 1, threads=1) == 128 + signal.SIGSEGV
    assert "rank 0 of 1 failed first: killed by SIGSEGV" in capfd.readouterr().err


def test_ranks_that_stop_at_different_times_are_let_finish(tmp_path: Path) -> None:
    body = "meet('up'); time.sleep(1.5 * RANK); open(f'{HERE}/saved-{RANK}', 'w'); sys.exit(75)"
    assert run_local(rank_command(body, tmp_path), 2, threads=1) == 75
    assert (tmp_path / "saved-1").exists()


def test_a_rank_that_hangs_after_the_others_stopped_is_ended(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "STOP_SECONDS", 0.3)
    body = "meet('up'); time.sleep(60) if RANK else sys.exit(75)"
    assert run_local(rank_command(body, tmp_path), 2, threads=1) == 137
    assert "rank 1 still runs and is killed" in capfd.readouterr().err


def test_a_rank_may_finish_long_before_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "STOP_SECONDS", 0.1)
    body = "time.sleep(0.8 * RANK); open(f'{HERE}/done-{RANK}', 'w')"
    assert run_local(rank_command(body, tmp_path), 2, threads=1) == 0
    assert (tmp_path / "done-1").exists()


def test_a_missing_program_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="no-such-program: cannot be started"):
        run_local([str(tmp_path / "no-such-program")], 2, threads=1)


def test_handlers_are_put_back(tmp_path: Path) -> None:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGCHLD)
    before = [signal.getsignal(number) for number in numbers]
    run_local(rank_command("", tmp_path), 1, threads=1)
    assert [signal.getsignal(number) for number in numbers] == before


def test_what_a_rank_leaves_behind_goes_with_it(tmp_path: Path) -> None:
    body = """
if os.fork() == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    meet('child')
    time.sleep(60)
while not os.path.exists(f"{HERE}/child-{RANK}"):
    time.sleep(0.01)
"""
    started = time.monotonic()
    assert run_local(rank_command(body, tmp_path), 2, threads=1) == 0
    assert time.monotonic() - started < 20
    left = pids(tmp_path, "child", 2)
    wait_until(lambda: not any(is_alive(pid) for pid in left), seconds=5)


STOPPABLE = """
def stop(number, frame):
    open(f"{HERE}/got-{RANK}-{signal.Signals(number).name}", "w")
    time.sleep(0.3 * RANK)
    sys.exit(75)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
    signal.signal(number, stop)
meet('up')
time.sleep(60)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR2"])
def test_a_stop_reaches_every_rank_and_75_comes_back(name: str, launcher: Callable, tmp_path: Path) -> None:
    process = launcher(STOPPABLE, 3)
    pids(tmp_path, "up", 3)
    process.send_signal(signal.Signals[name])
    assert process.wait(20) == 75
    assert sorted(file.name for file in tmp_path.glob("got-*")) == [f"got-{rank}-{name}" for rank in range(3)]


@pytest.mark.covers("F10")
def test_the_second_interrupt_ends_at_once(launcher: Callable, tmp_path: Path) -> None:
    body = "signal.signal(signal.SIGINT, lambda *_: open(f'{HERE}/got-{RANK}', 'w')); meet('up')\n"
    process = launcher(body + "while True: time.sleep(1)", 2)
    ranks = pids(tmp_path, "up", 2)
    process.send_signal(signal.SIGINT)
    wait_until(lambda: len(list(tmp_path.glob("got-*"))) == 2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    assert not any(is_alive(pid) for pid in ranks)


@pytest.mark.covers("F4")
def test_a_killed_launcher_leaves_no_orphan(launcher: Callable, tmp_path: Path) -> None:
    body = """
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
meet('up')
while True:
    time.sleep(1)
"""
    process = launcher(body, 3)
    ranks = pids(tmp_path, "up", 3)
    assert all(is_alive(pid) for pid in ranks)
    process.kill()
    wait_until(lambda: not any(is_alive(pid) for pid in ranks), seconds=5)


def test_an_error_inside_the_launcher_leaves_no_orphan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: object) -> None:
        raise RuntimeError("a fault of our own")

    monkeypatch.setattr(local, "_pass_output", breaks)
    body = "meet('up'); print('now', flush=True); time.sleep(60)"
    with pytest.raises(RuntimeError, match="a fault of our own"):
        run_local(rank_command(body, tmp_path), 2, threads=1)
    assert not any(is_alive(pid) for pid in pids(tmp_path, "up", 2))
