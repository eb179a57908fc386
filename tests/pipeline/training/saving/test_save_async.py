"""Saves in the background: the state of the moment, one in flight, failures seen at the next step, never torn."""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import CheckpointError
from pipeline.training.saving import save as save_module
from pipeline.training.saving.checkpoint import load_weights, newest_checkpoint
from pipeline.training.saving.fence import Fence
from pipeline.training.saving.manifest import committed
from pipeline.training.saving.save import Checkpoints
from pipeline.training.saving.state import RunState
from tests.pipeline.training.stand_ins import StandInFragments, stand_in_checkpoints


def state_after(step: int) -> RunState:
    return RunState(step=step, samples=8 * step)


@contextmanager
def held_writer(before: Callable[[], Any] = lambda: None) -> Iterator[threading.Event]:
    """Yield an event that the writer waits for before it writes; `before` is called after it, in the thread."""
    gate, plain = threading.Event(), save_module.write_stretches

    def write(path: Path, stretches: Any, *rest: Any) -> Any:
        assert gate.wait(60)
        before()
        return plain(path, stretches, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(save_module, "write_stretches", write)
        yield gate
        gate.set()


def polled(checkpoints: Checkpoints, until: Callable[[], bool]) -> int:
    """Poll as steps do until it holds; return after how many."""
    for count in range(1, 3000):
        checkpoints.poll()
        if until():
            return count
        time.sleep(0.005)
    raise AssertionError("polled in vain")


@pytest.mark.covers("F30")
def test_the_saved_state_is_that_of_the_step_named(tmp_path: Path) -> None:
    """Everything changes while the writer has not even begun."""
    fragments = StandInFragments()
    checkpoints, ema = stand_in_checkpoints(tmp_path, fragments)
    checkpoints.resume()
    fragments.step()
    ema.update()
    before = {fragment.name: fragment.master.clone() for fragment in fragments.owned}
    average = [mean.clone() for mean in ema.averages]
    with held_writer() as gate:
        state = state_after(1)
        checkpoints.begin(state)
        for step in (2, 3):
            fragments.step()
            ema.update()
            state.count(True, 8)
            checkpoints.poll()
            assert checkpoints.saved_step == -1 and committed(tmp_path) == [] and state.step == step
        gate.set()
        checkpoints.settle()
    newest = newest_checkpoint(tmp_path)
    assert newest.name == "step-00000001" and checkpoints.saved_step == 1
    raw, saved_average = load_weights(newest, "raw"), load_weights(newest, "ema")
    assert all(torch.equal(raw[name].view(-1), master) for name, master in before.items())
    names = [fragment.name for fragment in fragments.owned]
    assert all(torch.equal(saved_average[n].view(-1), mean) for n, mean in zip(names, average, strict=True))
    again, again_ema = stand_in_checkpoints(tmp_path, StandInFragments(seed=4), attempt="a2")
    resumed = again.resume()
    assert resumed is not None and resumed[0].samples == 8 and again_ema.updates == 1
    checkpoints.close()


def test_it_is_published_within_a_few_steps_and_the_pointer_follows(tmp_path: Path) -> None:
    checkpoints, _ = stand_in_checkpoints(tmp_path, StandInFragments())
    checkpoints.resume()
    checkpoints.begin(RunState())
    polled(checkpoints, lambda: checkpoints.saved_step == 0)
    assert (tmp_path / "latest").read_text() == "step-00000000\n"
    assert newest_checkpoint(tmp_path).name == "step-00000000"


def test_a_second_save_waits_for_the_first_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fragments = StandInFragments()
    checkpoints, _ = stand_in_checkpoints(tmp_path, fragments)
    checkpoints.resume()
    with held_writer(lambda: time.sleep(1.1)) as gate:
        gate.set()
        checkpoints.begin(RunState())
        fragments.updates = 1
        checkpoints.begin(state_after(1))
        assert checkpoints.saved_step == 0 and [path.name for path in committed(tmp_path)] == [
            "step-00000000"
        ]
        checkpoints.settle()
    assert checkpoints.saved_step == 1 and checkpoints.stall_seconds > 1.0
    assert "was still being written when step 1 was to be saved: training waited 1." in caplog.text
    assert checkpoints.figures()["save_stall_seconds"] > 1.0


@pytest.mark.covers("F29")
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError(5, "Input/output error"), "Input/output error"),
        (OSError(122, "Disk quota exceeded"), "Disk quota exceeded"),
        (OSError(30, "Read-only file system"), "Read-only file system"),
        (OSError(13, "Permission denied"), "Permission denied"),
        (MemoryError("no memory"), "MemoryError"),
        (RuntimeError("the writer broke"), "the writer broke"),
    ],
)
def test_a_failing_writer_is_seen_at_the_next_step_counted_and_moves_no_pointer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, error: Exception, words: str
) -> None:
    fragments = StandInFragments()
    checkpoints, _ = stand_in_checkpoints(tmp_path, fragments)
    checkpoints.resume()
    assert checkpoints.save(RunState())
    fragments.updates = 1

    def fail() -> None:
        raise error

    with held_writer(fail) as gate:
        gate.set()
        checkpoints.begin(state_after(1))
        polled(checkpoints, lambda: checkpoints.failed == 1)
    assert "step-00000001: not saved: rank 0: " in caplog.text and words in caplog.text
    assert "step-00000000 is intact; failure 1 of 3 in a row; training goes on" in caplog.text
    assert (tmp_path / "latest").read_text() == "step-00000000\n" and checkpoints.saved_step == 0
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert checkpoints.figures()["save_failures"] == 1
    assert checkpoints.save(state_after(1)) and newest_checkpoint(tmp_path).name == "step-00000001"


@pytest.mark.covers("F22", "F29")
def test_the_third_failure_in_a_row_ends_the_run_at_a_step(tmp_path: Path) -> None:
    fragments = StandInFragments()
    checkpoints, _ = stand_in_checkpoints(tmp_path, fragments)
    checkpoints.resume()

    def fail() -> None:
        raise OSError(28, "No space left on device")

    with held_writer(fail) as gate:
        gate.set()
        for count in (1, 2):
            checkpoints.begin(RunState())
            polled(checkpoints, lambda count=count: checkpoints.failed == count)  # type: ignore[misc]
        checkpoints.begin(RunState())
        with pytest.raises(CheckpointError, match="failure 3 of 3 in a row: make room"):
            polled(checkpoints, lambda: False)


@pytest.mark.covers("F35")
def test_taken_over_while_it_writes_it_ends_at_the_next_step(tmp_path: Path) -> None:
    checkpoints, _ = stand_in_checkpoints(tmp_path, StandInFragments(), attempt="old")
    checkpoints.resume()
    with held_writer() as gate:
        checkpoints.begin(RunState())
        time.sleep(0.05)
        Fence(tmp_path, "new").take()
        gate.set()
        with pytest.raises(CheckpointError, match="attempt new has taken over"):
            polled(checkpoints, lambda: False)
    assert committed(tmp_path) == []


def test_a_save_is_due_by_the_clock_and_the_clock_begins_again(tmp_path: Path) -> None:
    fragments = StandInFragments()
    checkpoints, _ = stand_in_checkpoints(tmp_path, fragments, every_seconds=0.3)
    checkpoints.resume()
    checkpoints.poll()
    assert not checkpoints.overdue
    began = time.monotonic()
    polled(checkpoints, lambda: checkpoints.overdue)
    assert time.monotonic() - began >= 0.2
    checkpoints.begin(RunState())
    assert not checkpoints.overdue
    polled(checkpoints, lambda: checkpoints.saved_step == 0)
    polled(checkpoints, lambda: checkpoints.overdue)
    checkpoints.settle()
    assert checkpoints.saved_step == 0


def test_closing_breaks_off_what_is_being_written_and_publishes_nothing(tmp_path: Path) -> None:
    checkpoints, _ = stand_in_checkpoints(tmp_path, StandInFragments())
    checkpoints.resume()
    with held_writer() as gate:
        checkpoints.begin(RunState())
        gate.set()
        checkpoints.close()
    assert committed(tmp_path) == []
    again, _ = stand_in_checkpoints(tmp_path, StandInFragments(), attempt="a2")
    assert again.resume() is None
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.covers("F26", "F27")
@pytest.mark.parametrize(
    "content", [None, b"", b"step-00000099\n", b"../../../etc/passwd\n", os.urandom(200)]
)
def test_no_pointer_can_mislead_a_resume(tmp_path: Path, content: bytes | None) -> None:
    """Deleted, empty, to a missing step, a way out of the folder, garbage: the scan of manifests decides."""
    checkpoints, _ = stand_in_checkpoints(tmp_path, StandInFragments())
    checkpoints.resume()
    assert checkpoints.save(RunState())
    (tmp_path / "latest").unlink()
    if content is not None:
        (tmp_path / "latest").write_bytes(content)
    again, _ = stand_in_checkpoints(tmp_path, StandInFragments(seed=2), attempt="a2")
    resumed = again.resume()
    assert resumed is not None and resumed[0].step == 0
    assert again.save(RunState()) and (tmp_path / "latest").read_text() == "step-00000000\n"


def test_what_goes_wrong_after_the_commit_is_only_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "latest").mkdir(parents=True)  # No pointer can be put there.
    checkpoints, _ = stand_in_checkpoints(tmp_path, StandInFragments())
    checkpoints.resume()
    with caplog.at_level(logging.WARNING):
        assert checkpoints.save(RunState())
    assert "saved, but the tidying up after it failed: Is a directory" in caplog.text
    assert newest_checkpoint(tmp_path).name == "step-00000000"
