"""One attempt from its start to its verdict: the ranks' exit records, their heartbeats, and their nodes."""

import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import FrameType

from launch.supervisor.exits import Ending, Exit, Verdict, first_failure, judge, read_exits
from launch.supervisor.hang import Judge, Silence, name_guilty
from launch.supervisor.nodes import controller_answers, silent_nodes
from launch.supervisor.step import Step, StepPlan
from launch.supervisor.straggler import Stragglers
from pipeline.config.health import HealthConfig
from pipeline.paths import RunPaths
from pipeline.training.health.heartbeat import read_heartbeats

LOOK_SECONDS = 0.25
PROBE_EVERY_SECONDS = 10.0
SETTLE_SECONDS = 2.0
# Every rank has left its record, yet srun goes on: it waits for something that is gone.
LINGER_SECONDS = 15.0
# A child that has not become srun yet would lose the signal.
SRUN_SECONDS = 1.0


@dataclass
class Wish:
    """What Slurm or the user has asked this process for by a signal; handlers only take note."""

    stop: bool = False

    def listen(self) -> None:
        """Take note of USR2 and TERM from now on."""
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.stop = True


@dataclass(frozen=True)
class Result:
    """What became of an attempt."""

    outcome: str
    """done, stopped, failed, crashed, stuck, lost or superseded."""
    code: int
    reason: str
    node: str = ""
    reached_step: int = -1


@dataclass
class Watch:
    """Looks at one step until it has ended, or must be ended."""

    run: RunPaths
    job_id: str
    plan: StepPlan
    health: HealthConfig
    wish: Wish
    addresses: Mapping[str, tuple[str, int]]
    """Where the slurmd of each node listens; only of those that have answered once."""
    _forwarded: bool = False
    _failed_at: float | None = None
    _all_gone_at: float | None = None
    _probed_at: float = field(default_factory=time.monotonic)

    def follow(self, step: Step) -> Result:
        """Return how `step` ended; it is killed when a rank has failed, hangs, or its node is lost."""
        started = time.monotonic()
        self._judge = Judge(self.health, self.plan.world_size)
        stragglers = Stragglers(self.plan, self.health.straggler_seconds)
        result: Result | None = None
        while step.wait(LOOK_SECONDS) is None and result is None:
            now = time.monotonic()
            if self.wish.stop and not self._forwarded and now - started > SRUN_SECONDS:
                self._forwarded = True
                step.signal(signal.SIGUSR2)
            exits = read_exits(self.plan.records)
            if self._must_end(exits, now):
                break
            if now - self._probed_at > PROBE_EVERY_SECONDS:
                result = self._lost_node()
            if self.plan.collective and result is None:
                beats = read_heartbeats(self.run)
                silence = self._judge.look(beats)
                if silence is not None:
                    result = self._lost_node() or self._stuck(step, silence, exits)
                for line in stragglers.look(beats):
                    say(self.job_id, line)
        # Before the tasks are ended: a node that is gone would look like one where they were killed.
        verdict = self._verdict(wait=step.wait(0) is not None)
        if result is None and verdict.ending is Ending.CRASHED:
            result = self._lost_node()
        step.kill(self.job_id, lost=result is not None and result.outcome == "lost")
        if result is None:
            result = Result(verdict.ending.value, verdict.code, verdict.line, verdict.node)
        return Result(result.outcome, result.code, result.reason, result.node, self._judge.reached_step)

    def _verdict(self, *, wait: bool) -> Verdict:
        """Return what the records say; those of a step that has ended may take a moment on a network's disk."""
        deadline = time.monotonic() + (SETTLE_SECONDS if wait else 0.0)
        while True:
            exits = read_exits(self.plan.records)
            if len(exits) == self.plan.world_size or time.monotonic() > deadline:
                return judge(exits, self.plan.world_size, stop_asked=self.wish.stop)
            time.sleep(0.1)

    def _must_end(self, exits: list[Exit], now: float) -> bool:
        if len(exits) == self.plan.world_size:
            self._all_gone_at = self._all_gone_at or now
            return now - self._all_gone_at > LINGER_SECONDS
        harmless = 128 + signal.SIGUSR2 if self.wish.stop else 0
        if self.plan.collective and first_failure([one for one in exits if one.code != harmless]):
            self._failed_at = self._failed_at or now
            return now - self._failed_at > SETTLE_SECONDS
        return False

    def _lost_node(self) -> Result | None:
        """Return a verdict when a node's slurmd takes no connection, twice."""
        self._probed_at = time.monotonic()
        silent = silent_nodes(self.addresses)
        if silent:
            time.sleep(1.0)
            silent = [node for node in silent_nodes(self.addresses) if node in silent]
        if not silent or not controller_answers(self.job_id):
            return None  # Or it is this host that is cut off.
        return Result("lost", 1, f"node {silent[0]} is lost: its slurmd takes no connection", silent[0])

    def _stuck(self, step: Step, silence: Silence, exits: list[Exit]) -> Result:
        """Ask every rank for its stacks, and return who holds the others up."""
        ended = {one.rank for one in exits}
        running = [rank for rank in range(self.plan.world_size) if rank not in ended]
        rank, how = name_guilty(self.run, self._judge, silence, running, lambda: step.signal(signal.SIGUSR1))
        node = self.plan.host_of(rank)
        return Result("stuck", 1, f"stuck: rank {rank} on {node} {how}", node)


def say(job_id: str, message: str) -> None:
    """Write a line into the job's log."""
    print(f"ldm job {job_id}: {message}", file=sys.stderr, flush=True)
