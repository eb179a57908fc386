"""The judge of hangs: how long silence is allowed in which phase, and whom the stacks give away."""

import pytest

from launch.supervisor.hang import Judge, guilty_rank, where
from pipeline.config.health import HealthConfig
from pipeline.training.health.heartbeat import Beat

HEALTH = HealthConfig(hang_seconds=10.0, start_seconds=100.0, save_seconds=50.0, evaluate_seconds=70.0)
WAITS = (
    'Thread 0x01 (most recent call first):\n  File "/lib/threading.py", line 1 in wait\n\n'
    'Current thread 0x02 (most recent call first):\n  File "/x/torch/distributed/distributed_c10d.py", line 9 in all_reduce\n'
    '  File "/p/pipeline/training/train.py", line 101 in train\n'
)
WORKS = (
    'Current thread 0x02 (most recent call first):\n  File "/p/pipeline/data/loader.py", line 77 in read\n'
)


def beat(rank: int, step: int = 5, phase: str = "step", time: float = 0.0) -> Beat:
    return Beat(rank, step, phase, time, time, 1, f"n{rank}")  # type: ignore[arg-type]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def judge(clock: Clock) -> Judge:
    """A judge that has seen both ranks pass their first step."""
    judge = Judge(HEALTH, 2, clock)
    for step in (4, 5):
        assert judge.look([beat(0, step), beat(1, step)]) is None
    return judge


def test_a_step_may_last_hang_seconds(judge: Judge, clock: Clock) -> None:
    clock.now = 9.9
    assert judge.look([beat(0), beat(1)]) is None
    clock.now = 10.1
    silence = judge.look([beat(0), beat(1)])
    assert silence is not None
    assert (silence.allowed_seconds, silence.phase, silence.step) == (10.0, "step", 5)


def test_one_silent_rank_is_enough(judge: Judge, clock: Clock) -> None:
    clock.now = 9.0
    assert judge.look([beat(0, 6), beat(1)]) is None
    clock.now = 11.0
    silence = judge.look([beat(0, 7), beat(1)])
    assert silence is not None
    assert silence.rank == 1


@pytest.mark.parametrize(
    ("phase", "allowed"), [("save", 50.0), ("evaluate", 70.0), ("load", 100.0), ("start", 100.0)]
)
def test_while_one_rank_is_in_a_longer_phase_the_others_may_wait(
    judge: Judge, clock: Clock, phase: str, allowed: float
) -> None:
    beats = [beat(0, phase=phase), beat(1)]
    judge.look(beats)
    clock.now = allowed - 0.1
    assert judge.look(beats) is None
    clock.now = allowed + 0.1
    assert judge.look(beats) is not None


def test_the_first_step_of_an_attempt_may_compile(clock: Clock) -> None:
    judge = Judge(HEALTH, 2, clock)
    judge.look([beat(0), beat(1)])
    clock.now = 99.0
    assert judge.look([beat(0), beat(1)]) is None
    clock.now = 101.0
    assert judge.look([beat(0), beat(1)]) is not None


def test_a_rank_that_never_speaks_is_found(clock: Clock) -> None:
    judge = Judge(HEALTH, 2, clock)
    clock.now = 99.0
    assert judge.look([beat(0, 1)]) is None
    clock.now = 101.0
    silence = judge.look([beat(0, 2)])
    assert silence is not None
    assert silence.rank == 1


def test_ranks_that_have_ended_are_not_judged(judge: Judge, clock: Clock) -> None:
    judge.look([beat(0, phase="stop"), beat(1, phase="stop")])
    clock.now = 1000.0
    assert judge.look([beat(0, phase="stop"), beat(1, phase="stop")]) is None


def test_who_does_not_answer_is_guilty() -> None:
    rank, why = guilty_rank([beat(r) for r in range(3)], {0: WAITS, 2: WAITS}, 3, [0, 1, 2])
    assert rank == 1
    assert "does not answer" in why


def test_who_stands_outside_of_a_collective_is_guilty() -> None:
    stacks = {0: WORKS, 1: WAITS, 2: WAITS}
    rank, why = guilty_rank([beat(r, time=-float(r)) for r in range(3)], stacks, 3, [0, 1, 2])
    assert rank == 0
    assert why == "2 other ranks wait for it; it is at data/loader.py:77 in read"


def test_who_is_behind_is_guilty_when_the_stacks_say_nothing() -> None:
    stacks = dict.fromkeys(range(3), WORKS)
    assert guilty_rank([beat(0, 6), beat(1, 6), beat(2, 5)], stacks, 3, [0, 1, 2])[0] == 2


def test_who_has_ended_is_not_asked() -> None:
    assert guilty_rank([beat(0), beat(1)], {1: WAITS}, 2, [1])[0] == 1


def test_the_place_is_the_main_threads() -> None:
    assert where(WAITS) == "distributed/distributed_c10d.py:9 in all_reduce"
    assert where("") == "an unknown place"
