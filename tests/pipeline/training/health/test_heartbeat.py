"""Signs of life: fixed size, in place, rarely, whole to a reader who takes no lock; stacks when a step hangs."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline.paths import RunPaths
from pipeline.training.health.heartbeat import (
    RECORD_BYTES,
    Beat,
    Heartbeat,
    decode,
    encode,
    name_silent,
    read_heartbeats,
)


class Clock:
    now_seconds = 100.0

    def __call__(self) -> float:
        return self.now_seconds


def beat_of(rank: int, step: int = 7, age_seconds: float = 0.0, phase: str = "step") -> Beat:
    return Beat(rank, step, phase, 1.5, time.time() - age_seconds, 4711, f"node-{rank}")  # type: ignore[arg-type]


def test_one_record_a_second_of_one_size_and_one_at_each_change_of_phase(tmp_path: Path) -> None:
    clock, paths = Clock(), RunPaths(tmp_path)
    with Heartbeat(paths, 3, hang_seconds=60.0, clock=clock) as heart:
        seen = [read_heartbeats(paths)[0]]
        for step, at_seconds in [(1, 100.2), (2, 100.9), (3, 101.0), (4, 101.5)]:
            clock.now_seconds = at_seconds
            heart.beat(step)
            seen.append(read_heartbeats(paths)[0])
        with heart.phase("save"):
            seen.append(read_heartbeats(paths)[0])
        seen.append(read_heartbeats(paths)[0])
        assert paths.heartbeat(3).stat().st_size == RECORD_BYTES
    seen.append(read_heartbeats(paths)[0])
    assert [(beat.step, beat.phase) for beat in seen] == [
        (0, "start"),
        (0, "start"),
        (0, "start"),
        (3, "start"),
        (3, "start"),
        (4, "save"),
        (4, "start"),
        (4, "stop"),
    ]
    assert (seen[0].rank, seen[0].pid, seen[0].monotonic_seconds) == (3, os.getpid(), 100.0)
    assert abs(seen[-1].time - time.time()) < 60
    assert not paths.stacks(3).exists()


def test_bytes_that_are_not_one_whole_record_are_none() -> None:
    record = encode(beat_of(1))
    assert len(record) == RECORD_BYTES and decode(record) == decode(bytes(record))
    for place in range(0, RECORD_BYTES, 7):
        damaged = bytearray(record)
        damaged[place] ^= 1
        assert decode(bytes(damaged)) is None
    for wrong in (b"", record[:-1], record + b" ", encode(beat_of(1, phase="sleep"))):
        assert decode(wrong) is None


def test_a_reader_beside_a_writer_sees_whole_records_only(tmp_path: Path) -> None:
    paths, read = RunPaths(tmp_path), threading.Event()
    seen: list[int] = []

    def read_often() -> None:
        while len(seen) < 50:
            seen.extend(beat.step for beat in read_heartbeats(paths))
        read.set()

    with Heartbeat(paths, 0, hang_seconds=60.0) as heart:
        heart.beat(0)
        reader = threading.Thread(target=read_often, daemon=True)
        reader.start()
        deadline, step = time.monotonic() + 60.0, 0
        while not read.is_set() and time.monotonic() < deadline:
            step += 1
            heart.beat(step)
            heart.enter("step")
    assert read.is_set() and seen == sorted(seen) and 0 <= seen[0] <= seen[-1] <= step


def test_who_is_silent_longest_is_named_and_who_has_ended_is_not() -> None:
    beats = [beat_of(0), beat_of(1, age_seconds=30.0), beat_of(2, age_seconds=5.0)]
    said = name_silent(beats, 0)
    assert "silent longest: rank 1 on node-1, pid 4711, for 30 s, after step 7, phase step" in said
    assert "rank 2" in name_silent([beat_of(0), beat_of(1, age_seconds=9.0, phase="stop"), beat_of(2)], 0)
    assert "rank 1" in name_silent([beat_of(0), beat_of(1, step=6), beat_of(2, age_seconds=5.0)], 0)
    assert name_silent([beat_of(0), beat_of(1, phase="stop")], 0).startswith("every other rank has said")


HANGS = """
import sys, time
from pathlib import Path
from pipeline.paths import RunPaths
from pipeline.training.health.heartbeat import Heartbeat
def wait_for_ever():
    time.sleep(60)
with Heartbeat(RunPaths(Path(sys.argv[1])), 0, hang_seconds=0.3) as heart:
    heart.beat(5)
    wait_for_ever()
"""


@pytest.mark.covers("F12")
def test_a_step_that_lasts_too_long_leaves_its_stacks(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", HANGS, str(tmp_path)])
    path = RunPaths(tmp_path).stacks(0)
    try:
        deadline_seconds = time.monotonic() + 20
        while "in wait_for_ever" not in (path.read_text() if path.exists() else ""):
            assert time.monotonic() < deadline_seconds, "no stacks"
            time.sleep(0.05)
    finally:
        child.kill()
        child.wait()
