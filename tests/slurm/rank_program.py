"""`python -m tests.slurm.rank_program RUN STEPS PLAN`: a rank without torch, with the run's own signs of life and fence.

Ranks meet at every step through files; rank 0 keeps a "checkpoint" every fifth step and notes each step with its time.
PLAN is JSON, {number of the start: [rank, step, fault]}: the fault befalls that rank before that step.
"""

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from launch.nodes import place
from launch.supervisor.history import newest_step, read_history
from pipeline.errors import PipelineError
from pipeline.paths import RunPaths
from pipeline.training.health.heartbeat import Heartbeat
from pipeline.training.saving.fence import Fence
from pipeline.training.stop import answer_with_stacks
from tests.slurm.torch.distributed.meeting import meet

CHECKPOINT_EVERY = 5
STEP_SECONDS = 0.1
asked = False


def note_stop(number: int, frame: FrameType | None) -> None:
    global asked
    asked = True


def befall(fault: str) -> None:
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "hold-lock":  # Waits in C for a lock of its own, under Python's.
        mutex, library = ctypes.create_string_buffer(64), ctypes.PyDLL(None)
        library.pthread_mutex_lock(mutex)
        library.pthread_mutex_lock(mutex)
    elif fault == "slow":
        time.sleep(4 * STEP_SECONDS)
    elif fault == "wait":
        while not asked:
            time.sleep(STEP_SECONDS)
    else:
        sys.exit(int(fault))


def main() -> None:
    run, total, plan = RunPaths(Path(sys.argv[1])), int(sys.argv[2]), json.loads(sys.argv[3])
    place_now, attempt = place(os.environ), os.environ["LDM_ATTEMPT"]
    rank = place_now.rank
    fault_rank, fault_step, fault = plan.get(str(len(read_history(run))), [-1, -1, ""])
    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, note_stop)
    answer_with_stacks(run.stacks(rank))
    folder = run.root / "meetings" / attempt
    folder.mkdir(parents=True, exist_ok=True)
    fence, step = Fence(run.checkpoints, attempt), max(0, newest_step(run))
    with Heartbeat(run, rank, hang_seconds=600.0) as heartbeat, (run.root / "steps.jsonl").open("a") as notes:
        if rank == 0:
            fence.take()
        step = int(meet(folder, -1, rank, place_now.world_size, str(step)))
        heartbeat.enter("step")
        while step < total:
            heartbeat.beat(step)
            if rank == fault_rank and (step == fault_step or fault == "slow"):
                befall(fault)
            time.sleep(STEP_SECONDS)
            word = meet(folder, step, rank, place_now.world_size, "stop" if asked else "go")
            step += 1
            if rank == 0:
                notes.write(json.dumps({"attempt": attempt, "step": step, "time": time.time()}) + "\n")
                notes.flush()
                if step % CHECKPOINT_EVERY == 0 or word == "stop" or step == total:
                    target = run.checkpoints / f"step-{step:08d}"
                    fence.refuse_stale(target)
                    target.mkdir(exist_ok=True)
                    (target / "of.txt").write_text(attempt)
            if word == "stop":
                sys.exit(75)


if __name__ == "__main__":
    try:
        main()
    except PipelineError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
