"""One job from its begin to its end: attempt after attempt, until it is done, must come back, or must not."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from launch.nodes import free_port, job_port
from launch.slurm.render import Stage, shape_of
from launch.supervisor import comeback
from launch.supervisor.comeback import Job
from launch.supervisor.events import tell
from launch.supervisor.exits import open_records, preflight_problems
from launch.supervisor.history import (
    Attempt,
    add_attempt,
    failures_without_progress,
    newest_step,
    read_history,
)
from launch.supervisor.nodes import STRIKES, bad_nodes, expand, note_bad, silent_nodes, slurmd_addresses
from launch.supervisor.step import Step, StepPlan, rank_environment
from launch.supervisor.watch import Result, Watch, Wish, say
from pipeline.config_file import load_config
from pipeline.errors import ConfigError, NoProgressError, StoppedError, ToolError
from pipeline.paths import RunPaths
from pipeline.training.saving.fence import fence_holder

# Stages whose tasks are one world; encode's are workers on their own.
COLLECTIVE: frozenset[Stage] = frozenset({"train", "rehearse"})
# Ports of one job's starts lie beside each other; the next job's begin PORT_STRIDE further.
STARTS_PER_RESTART = 5


@dataclass(frozen=True)
class Order:
    """What the batch script asks for."""

    run: RunPaths
    stage: Stage
    log: str
    threads: int
    options: tuple[str, ...]
    command: tuple[str, ...]

    @classmethod
    def of(cls, environment: Mapping[str, str], words: Sequence[str]) -> "Order":
        """Return the order of a batch script: its LDM_JOB_ variables, and `words`: srun's options -- the command.

        Raises:
            ConfigError: when it is none.
        """
        stage = environment.get("LDM_JOB_STAGE", "")
        at = list(words).index("--") if "--" in words else len(words)
        if stage not in get_args(Stage) or not words[at + 1 :]:
            raise ConfigError("the supervisor is started by the batch script that `ldm submit` writes")
        run = RunPaths(Path(environment["LDM_JOB_RUN"]))
        threads = int(environment["LDM_JOB_THREADS"])
        log = environment["LDM_JOB_LOG"]
        return cls(run, stage, log, threads, tuple(words[:at]), tuple(words[at + 1 :]))  # type: ignore[arg-type]


@dataclass
class Supervisor:
    """The batch host's side of one job."""

    order: Order
    environment: Mapping[str, str]
    wish: Wish = field(default_factory=Wish)

    def __post_init__(self) -> None:
        self.run, self.stage = self.order.run, self.order.stage
        self.job = Job.of(self.environment)
        self.config = load_config(self.run.sbatch.with_suffix(".yaml"))
        self.health = self.config.health
        self.shape = shape_of(self.stage, self.config.cluster)
        self.hosts = expand(self.environment["SLURM_JOB_NODELIST"])
        addresses = slurmd_addresses(self.hosts)
        silent = silent_nodes(addresses)
        # Where no node but this one answers, a firewall stands between: then silence says nothing.
        self.addresses = addresses if len(silent) < max(1, len(addresses) - 1) else {}
        self.lost = set(silent if self.addresses else ())

    def supervise(self) -> int:
        """Return the code that the job ends with, after as many attempts as it takes."""
        follower = comeback.read_followers(self.run).get(self.job.job_id)
        if follower is not None:
            say(self.job.job_id, f"job {follower} goes on in the place of this one, which ends")
            return 0
        for node in self.lost:
            note_bad(self.run, node, "lost", "its slurmd took no connection when the job began")
        for number in range(10**6):
            hosts = self._usable_hosts()
            if len(hosts) < self.shape.nodes:
                return self._follow_elsewhere(
                    f"{len(hosts)} of {len(self.hosts)} nodes can be used, {self.shape.nodes} are needed"
                )
            if self.wish.stop:
                return self._come_back("told to stop before the ranks began")
            result = self._attempt(number, hosts[: self.shape.nodes])
            code = self._next(result)
            if code is not None:
                return code
        raise AssertionError("unreachable")

    def _usable_hosts(self) -> list[str]:
        bad = {*self.lost, *bad_nodes(self.run)}
        return [host for host in self.hosts if host not in bad]

    def _attempt(self, number: int, hosts: Sequence[str]) -> Result:
        """Start all ranks, see them to their end, and write down what became of them."""
        run, plan = self.run, self._plan(number, hosts)
        first, started, before = newest_step(run), time.time(), fence_holder(run.checkpoints)
        addresses = {node: place for node, place in self.addresses.items() if node in hosts}
        watch = Watch(run, self.job.job_id, plan, self.health, self.wish, addresses)
        result = watch.follow(self._start(number, plan))
        holder = fence_holder(run.checkpoints)
        if holder not in (before, plan.attempt):
            # This host was cut off or held up, and the run goes on elsewhere: nothing here is worth a word to anybody.
            result = Result("superseded", 1, f"attempt {holder} has taken over this run")
        attempt = Attempt(
            plan.attempt,
            self.job.job_id,
            started,
            time.time(),
            first,
            newest_step(run),
            result.reached_step,
            result.outcome,
            result.reason,
            plan.hosts,
            self.stage,
        )
        add_attempt(run, attempt)
        lost = f"; {attempt.lost_steps} steps to do again" if attempt.lost_steps else ""
        say(self.job.job_id, f"attempt {plan.attempt} {result.outcome}: {result.reason}{lost}")
        self._blame(plan, result)
        return result

    def _plan(self, number: int, hosts: Sequence[str]) -> StepPlan:
        name = f"{self.job.job_id}.{self.job.restart}.{number}"
        return StepPlan(
            name,
            tuple(hosts),
            self.shape.tasks_per_node,
            int(self.environment.get("SLURM_CPUS_PER_TASK") or 1),
            self.order.options,
            self.order.command,
            self.order.log,
            open_records(self.run, name),
            self.stage in COLLECTIVE,
        )

    def _start(self, number: int, plan: StepPlan) -> Step:
        if plan.collective:
            for old in self.run.heartbeats.glob("rank-*.json"):
                old.unlink(missing_ok=True)  # An old rank that lives on writes into a file without a name.
        job, address = self.job, plan.hosts[0]
        port = job_port(int(job.job_id), job.restart * STARTS_PER_RESTART + number)
        if address == self.environment.get("SLURMD_NODENAME"):
            port = free_port(port, "")  # Only of this host we can know.
        environment = rank_environment(
            self.environment, plan, address=address, port=port, threads=self.order.threads
        )
        where = ",".join(plan.hosts)
        say(job.job_id, f"attempt {plan.attempt}: {plan.world_size} ranks on {where}, meeting at port {port}")
        return Step(plan, environment)

    def _blame(self, plan: StepPlan, result: Result) -> None:
        """Put the nodes on the list that are to blame."""
        problems = preflight_problems(plan.records)
        for node, reason in problems.items():
            note_bad(self.run, node, "preflight", reason)
            say(self.job.job_id, f"node {node} has failed the preflight: {reason}")
        if result.outcome == "lost":
            self.lost.add(result.node)
        if result.outcome in STRIKES and result.node:
            note_bad(self.run, result.node, result.outcome, result.reason)

    def _next(self, result: Result) -> int | None:
        """Return the code to end with, or None for another attempt in this job."""
        if result.outcome == "superseded":
            return result.code
        if result.outcome == "done":
            self._tell("done", result.reason)
            return 0
        if result.outcome == "failed":
            self._tell("failed", result.reason)
            return result.code
        if result.outcome == "stuck":
            self._tell("stuck", result.reason)
        state = comeback.state_of(self.job)
        # Told by nobody here, but by Slurm directly: the grace before a preemption.
        self.wish.stop = self.wish.stop or state.get("PreemptTime", "None")[:1].isdigit()
        if (result.outcome == "stopped" or self.wish.stop) and comeback.is_cancelled(
            self.job, self.run, state
        ):
            say(self.job.job_id, "stopped and not requeued: it was cancelled")
            return result.code
        if result.outcome == "stopped":
            return self._come_back(result.reason)
        failures = failures_without_progress(self._own_history(), newest_step(self.run))
        if failures > self.health.restarts_without_progress:
            reason = f"{failures} starts in a row without a newer checkpoint; the last: {result.reason}"
            say(self.job.job_id, f"no progress: {reason}")
            self._tell("failed", reason)
            return NoProgressError.exit_code
        return self._come_back(result.reason) if self.wish.stop else None

    def _own_history(self) -> list[Attempt]:
        """Return the attempts at what this job does: those of a training over all jobs, a worker's its own alone."""
        own = [attempt for attempt in read_history(self.run) if attempt.stage == self.stage]
        if self.stage in COLLECTIVE:
            return own
        return [attempt for attempt in own if attempt.job == self.job.job_id]

    def _come_back(self, reason: str) -> int:
        """Put the job back into the queue, or a new one behind it, and return the code to leave with."""
        self._tell("requeued", reason)
        say(
            self.job.job_id,
            f"stopped with exit code {StoppedError.exit_code}; back to the queue to go on from the newest checkpoint",
        )
        refusal = comeback.requeue(self.job) if self.config.cluster.requeue else "cluster.requeue is false"
        if refusal:
            self._follow(f"not requeued ({refusal})", at_once=False)
        return StoppedError.exit_code

    def _follow_elsewhere(self, reason: str) -> int:
        self._tell("requeued", reason)
        return StoppedError.exit_code if self._follow(reason, at_once=True) else 1

    def _follow(self, reason: str, *, at_once: bool) -> bool:
        exclude = sorted({*self.lost, *bad_nodes(self.run)})
        if self.stage == "encode":
            say(self.job.job_id, f"{reason}: submit it again to go on")
            return False
        try:
            new = comeback.follow(self.job, self.config, self.run, self.stage, exclude, at_once=at_once)
        except ToolError as error:
            say(self.job.job_id, f"{reason}, and no job follows this one: {error}; submit it again to go on")
            return False
        without = f" without {','.join(exclude)}" if exclude else ""
        say(self.job.job_id, f"{reason}; job {new} goes on from the newest checkpoint{without}")
        return True

    def _tell(self, event: str, reason: str) -> None:
        tell(self.health.on_event, event, self.run, f"job {self.job.job_id}: {reason}")  # type: ignore[arg-type]


def run_job(words: Sequence[str]) -> int:
    """Supervise the job of this batch script and return its exit code.

    Raises:
        PipelineError: when what the script says, or the config beside it, cannot be used.
    """
    wish = Wish(stop=bool(os.environ.get("LDM_JOB_STOP")))
    wish.listen()
    return Supervisor(Order.of(os.environ, words), os.environ, wish).supervise()
