"""A training on this machine is started again after a crash or a hang, but only behind a newer checkpoint."""

import json
import sys
from pathlib import Path

import pytest

from launch.local import train_local
from pipeline.config.health import HealthConfig
from pipeline.paths import RunPaths
from tests.launch.rank_programs import PROLOGUE, ROOT, rank_command

# Each start takes the next code of the list and makes as many checkpoints as the entry says.
STARTS = """
import json
file = f"{HERE}/starts"
meet(f"start-{len(open(file).read()) if os.path.exists(file) else 0}")
plan = json.loads(sys.argv[2])
started = len(open(file).read()) if os.path.exists(file) else 0
time.sleep(0.1)
if RANK == 0:
    open(file, "a").write("x")
    if plan[started][1]:
        os.makedirs(f"{HERE}/checkpoints/step-{plan[started][1]:08d}")
sys.exit(plan[started][0])
"""


@pytest.mark.covers("F17")
@pytest.mark.parametrize(
    ("starts", "code"),
    [
        ([[137, 0]], 137),  # A crash before the first checkpoint is the user's to look at.
        ([[137, 5], [1, 10], [0, 0]], 0),
        ([[137, 5], [137, 0]], 6),
        ([[137, 5], [75, 0]], 75),
        ([[5, 5]], 5),
        ([[2, 0]], 2),
        ([[143, 5]], 143),
    ],
)
def test_a_crash_is_followed_by_a_start_only_behind_a_newer_checkpoint(
    tmp_path: Path, starts: list[list[int]], code: int
) -> None:
    command = [*rank_command(STARTS, tmp_path), json.dumps(starts)]
    assert train_local(command, 2, RunPaths(tmp_path), threads=1, health=HealthConfig()) == code
    assert (tmp_path / "starts").read_text() == "x" * len(starts)


# Rank 1 sleeps after 13 steps of the first start; rank 0 waits for it in a file that lies where torch's collectives do.
HANGS = """
from pathlib import Path
from pipeline.paths import RunPaths
from pipeline.training.health.heartbeat import Heartbeat
from pipeline.training.stop import answer_with_stacks
from tests.slurm.torch.distributed.meeting import meet as collective
run = RunPaths(Path(HERE))
started = os.path.exists(f"{HERE}/checkpoints")
answer_with_stacks(run.stacks(RANK))
meet(f"start-{started}")
with Heartbeat(run, RANK, hang_seconds=600.0) as heartbeat:
    heartbeat.enter("step")
    for step in range(15):
        heartbeat.beat(step)
        if RANK == 0 and step == 2:
            os.makedirs(f"{HERE}/checkpoints/step-{10 * started + step:08d}")
        if RANK == 1 and step == 13 and not started:
            time.sleep(600)
        time.sleep(0.1)
        collective(Path(HERE), 100 * started + step, RANK, SIZE, "go")
"""


@pytest.mark.faults
@pytest.mark.covers("F11")
def test_a_rank_that_hangs_is_named_and_all_start_again_from_the_newer_checkpoint(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    health = HealthConfig(hang_seconds=2.0, start_seconds=30.0)
    command = [sys.executable, "-c", PROLOGUE + HANGS, str(tmp_path)]
    assert train_local(command, 2, RunPaths(tmp_path), threads=1, health=health) == 0
    said = capfd.readouterr().err
    assert "stuck: rank 1 of 2 holds the others up: 1 other ranks wait for it; it is at <string>:" in said
    assert "starts again from the checkpoint of step 2" in said
    assert "in meet" in RunPaths(tmp_path).stacks(0).read_text()
