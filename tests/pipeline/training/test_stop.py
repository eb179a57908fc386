"""The wish to stop: signals, file and clock, agreed one step late; in one process, several in tests/distributed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.training.stop import Reason, Stop
from pipeline.training.world import World


class Clock:
    def __init__(self) -> None:
        self.now_seconds = 100.0

    def __call__(self) -> float:
        return self.now_seconds


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_signal_stops_one_step_later_and_the_handlers_are_put_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Stop(World()) as stop:
        assert not stop.agreed()
        os.kill(os.getpid(), number)
        assert not stop.agreed()
        assert stop.agreed() and stop.reason is Reason.SIGNAL and str(stop.reason) == "signal"
        assert stop.agreed()
    assert signal.getsignal(number) is before


def test_no_wish_is_no_stop() -> None:
    with Stop(World()) as stop:
        assert not any(stop.agreed() for _ in range(5))
        assert str(stop.reason) == ""


def test_the_clock() -> None:
    clock = Clock()
    stop = Stop(World(), max_seconds=10.0, clock=clock)
    assert not stop.agreed()
    clock.now_seconds += 9.9
    assert not stop.agreed() and not stop.agreed()
    clock.now_seconds += 0.1
    assert not stop.agreed()
    assert stop.agreed() and str(stop.reason) == "max seconds"


def test_the_file_is_looked_for_once_a_second_and_removed_when_obeyed(tmp_path: Path) -> None:
    clock, file = Clock(), tmp_path / "stop"
    stop = Stop(World(), stop_file=file, clock=clock)
    assert not stop.agreed()
    file.touch()
    assert not stop.agreed() and not stop.agreed()
    clock.now_seconds += 1.0
    assert not stop.agreed() and file.exists()
    assert stop.agreed() and str(stop.reason) == "stop file" and not file.exists()


def test_other_ranks_do_not_look_for_the_file(tmp_path: Path) -> None:
    (tmp_path / "stop").touch()
    stop = Stop(World(rank=1), stop_file=tmp_path / "stop")
    assert not stop.agreed() and not stop.agreed()


CHILD = """
import sys, time
from pathlib import Path
from pipeline.training.stop import Stop
from pipeline.training.world import World
with Stop(World(), stacks=Path(sys.argv[1])) as stop:
    print("ready", flush=True)
    while True:
        stop.agreed()
        print(stop.reason, flush=True)
        time.sleep(0.02)
"""


def start_child(stacks: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(stacks)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    return child


@pytest.mark.covers("F10")
def test_a_second_ctrl_c_ends_the_process_at_once(tmp_path: Path) -> None:
    child = start_child(tmp_path / "stacks.txt")
    assert child.stdout is not None
    child.send_signal(signal.SIGINT)
    while child.stdout.readline().strip() != "signal":
        pass
    child.send_signal(signal.SIGINT)
    assert child.wait(10) == -signal.SIGINT


@pytest.mark.covers("F12")
def test_usr1_writes_the_stacks_to_stderr_and_to_the_log_and_changes_nothing(tmp_path: Path) -> None:
    stacks = tmp_path / "log" / "stacks.txt"
    child = start_child(stacks)
    for times in (1, 2):
        child.send_signal(signal.SIGUSR1)
        wait_until(lambda count=times: stacks.read_text().count("<string>") >= count)
        time.sleep(0.3)  # The file is written from C; stderr when Python comes to it.
    assert child.poll() is None
    child.kill()
    _, said = child.communicate(timeout=10)
    assert said.count("most recent call first") == stacks.read_text().count("most recent call first") == 2
    assert "<string>" in said


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_seconds = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline_seconds, "waited in vain"
        time.sleep(0.02)


@pytest.mark.covers("F9")
def test_a_forked_child_ignores_what_its_group_gets() -> None:
    with Stop(World()) as stop:
        pid = os.fork()
        if pid == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            stop.agreed()
            os._exit(int(stop.agreed()))
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
