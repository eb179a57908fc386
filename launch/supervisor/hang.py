"""The only judge of a hang: heartbeats that stand still, then the stacks of all ranks, then a name.

Silence says that somebody hangs, not who: within a second all ranks wait for the guilty one. Their stacks say it. Who
waits stands in a collective; the guilty rank stands somewhere else, or, stopped or cut off, does not answer at all.
"""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.config.health import HealthConfig
from pipeline.paths import RunPaths
from pipeline.training.health.heartbeat import Beat

# Where a rank stands that waits for the others.
COLLECTIVE = re.compile(r'File "[^"]*(?:/torch/distributed/|/deepspeed/comm/|/pipeline/training/world\.py)')
ANSWER_SECONDS = 5.0


@dataclass(frozen=True)
class Silence:
    """The rank that has been silent longest, how long, and what it was allowed."""

    rank: int
    seconds: float
    allowed_seconds: float
    phase: str
    step: int


@dataclass
class _Seen:
    beat: Beat
    since: float
    first_step: int | None = None


@dataclass
class Judge:
    """Watches the heartbeats of one attempt on this process's own clock: clocks of nodes differ."""

    health: HealthConfig
    world_size: int
    clock: Callable[[], float] = time.monotonic
    _begin: float = field(init=False)
    _seen: dict[int, _Seen] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._begin = self.clock()

    def look(self, beats: Sequence[Beat]) -> Silence | None:
        """Take in the newest heartbeats; return the longest silence if it is longer than allowed.

        The longest of all ranks' allowances holds for all: while one saves, the others wait for it.
        """
        now = self.clock()
        for beat in beats:
            seen = self._seen.get(beat.rank)
            if seen is None:
                seen = self._seen[beat.rank] = _Seen(beat, now)
            elif beat != seen.beat:
                seen.beat, seen.since = beat, now
            if beat.phase == "step" and seen.first_step is None:
                seen.first_step = beat.step
        running = [seen for seen in self._seen.values() if seen.beat.phase != "stop"]
        allowances = [self._allowance(seen) for seen in running]
        if len(self._seen) < self.world_size:
            allowances.append(self.health.start_seconds)
            running += [self._unseen(rank) for rank in range(self.world_size) if rank not in self._seen]
        if not running:
            return None
        oldest = min(running, key=lambda seen: seen.since)
        silent = now - oldest.since
        if silent <= max(allowances):
            return None
        return Silence(oldest.beat.rank, silent, max(allowances), oldest.beat.phase, oldest.beat.step)

    @property
    def reached_step(self) -> int:
        """Steps finished by the rank that is farthest, -1 before the first word of any."""
        return max((seen.beat.step for seen in self._seen.values()), default=-1)

    @property
    def beats(self) -> list[Beat]:
        """The last word of each rank that has spoken."""
        return [seen.beat for seen in self._seen.values()]

    def _unseen(self, rank: int) -> _Seen:
        return _Seen(Beat(rank, 0, "start", 0.0, 0.0, 0, ""), self._begin)

    def _allowance(self, seen: _Seen) -> float:
        health = self.health
        if seen.beat.phase == "step":
            # The first step of an attempt compiles.
            return health.start_seconds if seen.first_step == seen.beat.step else health.hang_seconds
        return {"save": health.save_seconds, "evaluate": health.evaluate_seconds}.get(
            seen.beat.phase, health.start_seconds
        )


def name_guilty(
    run: RunPaths,
    judge: Judge,
    silence: Silence,
    running: Sequence[int],
    ask: Callable[[], None],
) -> tuple[int, str]:
    """Return the rank of `running` that holds the others up, and how that shows; `ask` sends USR1 to all of them.

    Their stacks are in the run folder then.
    """
    marks = {rank: mark for rank, mark in stack_marks(run, judge.world_size).items() if rank in running}
    ask()
    stacks = collect_stacks(run, marks)
    rank, how = guilty_rank(judge.beats, stacks, judge.world_size, running)
    return rank, (
        f"holds the others up: {how}; no sign of life for {silence.seconds:.0f} s in phase {silence.phase} after step "
        f"{silence.step} (allowed {silence.allowed_seconds:g} s); stacks of {len(stacks)} of {len(running)} ranks in "
        f"{run.log}/stacks-rank-*.txt"
    )


def stack_marks(run: RunPaths, world_size: int) -> dict[int, int]:
    """Return the size of each rank's file of stacks: what lies behind is written later."""
    return {rank: _size(run, rank) for rank in range(world_size)}


def collect_stacks(
    run: RunPaths, marks: Mapping[int, int], *, wait_seconds: float = ANSWER_SECONDS
) -> dict[int, str]:
    """Return what ranks have written to their files of stacks since `marks`, waiting for all of them a while."""
    deadline = time.monotonic() + wait_seconds
    while any(_size(run, rank) <= mark for rank, mark in marks.items()) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.3)  # The last one may still write.
    stacks = {}
    for rank, mark in marks.items():
        if _size(run, rank) > mark:
            with run.stacks(rank).open("rb") as stream:
                stream.seek(mark)
                stacks[rank] = stream.read().decode(errors="replace")
    return stacks


def guilty_rank(
    beats: Sequence[Beat], stacks: Mapping[int, str], world_size: int, running: Sequence[int]
) -> tuple[int, str]:
    """Return the rank that the others wait for, and how that shows.

    `running` are the ranks that have not ended. In this order: who does not answer; who stands outside of a
    collective while others wait in one; who is the farthest behind.
    """
    by_rank = {beat.rank: beat for beat in beats}
    candidates = sorted(running) or list(range(world_size))

    def behind(rank: int) -> tuple[int, float]:
        beat = by_rank.get(rank)
        return (beat.step, beat.time) if beat else (-1, 0.0)

    silent = [rank for rank in candidates if rank not in stacks]
    if silent and len(silent) < len(candidates):
        return min(silent, key=behind), "it does not answer: stopped, cut off, or waiting in the kernel"
    waiting = {rank for rank in candidates if COLLECTIVE.search(stacks.get(rank, ""))}
    busy = [rank for rank in candidates if rank not in waiting]
    if waiting and busy:
        rank = min(busy, key=behind)
        return rank, f"{len(waiting)} other ranks wait for it; it is at {where(stacks[rank])}"
    rank = min(candidates, key=behind)
    return rank, "it is the farthest behind; the stacks do not tell more"


def where(stack: str) -> str:
    """Return the innermost place of the main thread: the last thread that faulthandler writes."""
    threads = re.split(r"^(?=(?:Current thread|Thread) 0x)", stack, flags=re.MULTILINE)
    frames = re.findall(r'File "([^"]+)", line (\d+) in (\S+)', threads[-1])
    if not frames:
        return "an unknown place"
    path, line, function = frames[0]
    return f"{'/'.join(path.split('/')[-2:])}:{line} in {function}"


def _size(run: RunPaths, rank: int) -> int:
    try:
        return run.stacks(rank).stat().st_size
    except FileNotFoundError:
        return 0
