"""`ldm plan --calibrate` against short runs of `ldm train`: an unseen batch, a second process, and seconds to recover.

    python -m benchmarks.calibration --within 0.15 --processes-within 0.25

Runs of a small U-Net on a tiny data set. Batches of 4 and 16 in one process set both constants; a batch of 8 is predicted
and then run. For two processes CPU seconds a step are compared: what a longer run used beyond a shorter one, so that
start-up drops out. Weak scaling is the step of one process over that of two with as many samples each. The first run's
time from its start to its first record is what a restart costs here.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.conditions import conditions_now
from pipeline.config_file import dump_config, load_config
from pipeline.paths import RunPaths
from pipeline.plan.calibrate import calibrate, observe
from pipeline.plan.workload import workload_of
from pipeline.publish import write_json
from tests.builders import tiny_dataset, tiny_run

REPOSITORY = Path(__file__).resolve().parents[1]
MODEL = {"block_out_channels": [64, 128], "layers_per_block": 1}
SHORT, LONG, SAMPLES = 8, 40, 69


class Runs:
    """Trainings of one data set, each in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        made = tiny_run(folder / "made", model=MODEL)
        shutil.rmtree(made.paths.latents)  # Too few samples for the batches here.
        tiny_dataset(made.paths.latents, made.paths.autoencoder, made.paths.text_encoder, count=SAMPLES)
        self._config = folder / "base.yaml"
        self._config.write_text(dump_config(made.config))
        self._dataset = made.paths.latents

    def train(self, name: str, batch: int, processes: int, steps: int) -> tuple[Path, float, float]:
        """Return the run's folder, its CPU seconds (children included) and the seconds to its first record."""
        overrides = [
            f"name={name}",
            f"runs={self._folder}",
            f"data.dataset={self._dataset}",
            f"engine.global_batch={batch}",
            f"engine.micro_batch={batch // processes}",
            f"engine.processes={processes}",
            "engine.precision=fp32",
            f"train.steps={steps}",
            "train.log_every=4",
            "tracking.mlflow=off",
            "train.checkpoint_every=100000",
            "optimizer.warmup_steps=1",
        ]
        config = load_config(self._config, overrides)
        path = self._folder / f"{name}.yaml"
        path.write_text(dump_config(config))
        began = time.time()
        process = subprocess.Popen(
            [sys.executable, "-m", "launch.cli", "train", str(path)],
            cwd=REPOSITORY,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        assert process.stderr is not None
        said = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"ldm train {name}: exit code {process.returncode}\n{said.decode()[-2000:]}")
        run = self._folder / name
        first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
        return run, usage.ru_utime + usage.ru_stime, first["time"] - began


def main(argv: Sequence[str] | None = None) -> int:
    """Run the trainings, print and write what was predicted and found.

    Raises: SystemExit with code 1 where an error is beyond its bound.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibration", description=__doc__)
    parser.add_argument("--within", type=float, help="largest error for the unseen batch, e.g. 0.15")
    parser.add_argument("--processes-within", type=float, help="largest error for two processes, e.g. 0.25")
    parser.add_argument("--out-dir", type=Path, default=REPOSITORY / "benchmarks" / "results")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Runs(Path(folder)))
    write_json(options.out_dir / "calibration.json", found)
    print(json.dumps(found, indent=2))
    bounds = (("batch", options.within), ("processes", options.processes_within))
    late = [name for name, bound in bounds if bound is not None and abs(found[f"{name}_error"]) > bound]
    if late:
        print(f"calibration: beyond its bound: {', '.join(late)}", file=sys.stderr)
    return 1 if late else 0


def measure(runs: Runs) -> dict[str, Any]:
    """Return the file's content: predictions, findings and their relative errors; the first half is printed early."""
    small, _, recovery = runs.train("small", 4, 1, LONG)
    large, _, _ = runs.train("large", 16, 1, LONG)
    middle, _, _ = runs.train("middle", 8, 1, LONG)
    found = unseen_batch(small, large, middle) | {"recovery_seconds": recovery}
    print(json.dumps(found, indent=2), flush=True)
    pair = [runs.train(f"two-{steps}", 16, 2, steps) for steps in (SHORT, LONG)]
    cpu, both = [one[1] for one in pair], RunPaths(pair[-1][0])
    workload = workload_of(load_config(both.config), both)
    predicted, seen = (
        2 * calibrate([small, large]).step_seconds(workload, 2),
        (cpu[1] - cpu[0]) / (LONG - SHORT),
    )
    return found | {
        "processes_predicted_cpu_seconds": predicted,
        "processes_cpu_seconds": seen,
        "processes_error": predicted / seen - 1,
        "weak_scaling": found["batch_seconds"] / observe(both.root).step_seconds,
    }


def unseen_batch(small: Path, large: Path, middle: Path) -> dict[str, Any]:
    """Return the constants that two runs set, and what they foretell of the third beside what it took."""
    constants, paths = calibrate([small, large]), RunPaths(middle)
    workload = workload_of(load_config(paths.config), paths)
    predicted, seen = constants.step_seconds(workload, 1), observe(middle).step_seconds
    conditions = conditions_now()
    kept = ("commit", "date", "cpu", "cores", "load_before", "torch", "deepspeed")
    return {
        "base_seconds": constants.base_seconds,
        "batch_predicted_seconds": predicted,
        "batch_seconds": seen,
        "batch_error": predicted / seen - 1,
        "conditions": {name: conditions[name] for name in kept},
    }


if __name__ == "__main__":
    sys.exit(main())
