"""Progress: what is written, how often, and where."""

import io
import sys

import pytest

from pipeline.progress import PlainProgress, Progress, clock_text, followed, progress_bar, rate_text


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_at_most_every_ten_seconds_and_the_last_state() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = PlainProgress(100, "train", stream=stream, clock=clock)
    for _ in range(100):
        clock.seconds += 0.5
        progress.advance(1, loss=0.123456)
    progress.finish()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 5  # at 10, 20, 30, 40, 50 s; the last one is the last state and is not said twice
    assert lines[0] == "train: 20/100 step, 2.0 step/s, 0:40 left, loss 0.1235"
    assert lines[-1] == "train: 100/100 step, 2.0 step/s, loss 0.1235"


def test_a_resumed_run_counts_its_rate_from_where_it_started() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = PlainProgress(1000, "train", done=900, stream=stream, clock=clock)
    clock.seconds = 100.0
    progress.advance(50)
    progress.finish()
    assert stream.getvalue() == "train: 950/1000 step, 2.0 s/step, 1:40 left\n"


def test_quick_work_shows_one_line_on_stderr_only(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(3, "encode", unit="image") as progress:
        progress.advance(2, shard="00001")
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("encode: 2/3 image") and said.err.endswith("shard 00001\n")
    assert said.err.count("\n") == 1


def test_the_last_state_is_shown_when_the_work_fails(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), progress_bar(3, "encode") as progress:
        progress.advance()
        raise ZeroDivisionError
    assert "encode: 1/3 step" in capsys.readouterr().err


def test_quiet_shows_nothing_and_still_counts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LDM_QUIET", "1")
    with progress_bar(3, "encode", done=1) as progress:
        progress.advance(2, loss=1.0)
    assert type(progress) is Progress and progress.done == 3
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_with_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with progress_bar(8, "train [demo]", unit="step") as progress:
        progress.advance(8, loss=0.25)
    painted = terminal.getvalue()
    assert "train [demo]" in painted and "8/8" in painted and "loss 0.25" in painted


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3723, "1:02:03")])
def test_durations(seconds: float, text: str) -> None:
    assert clock_text(seconds) == text


@pytest.mark.parametrize(
    ("rate", "text"), [(12.34, "12.3 step/s"), (1.0, "1.0 step/s"), (0.25, "4.0 s/step")]
)
def test_rates(rate: float, text: str) -> None:
    assert rate_text(rate, "step") == text


def test_followed_items_are_all_there_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(followed([3, 1, 2], "verify", unit="shard")) == [3, 1, 2]
    assert capsys.readouterr().err.splitlines()[-1].startswith("verify: 3/3 shard")
