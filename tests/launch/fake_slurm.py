"""A cluster of recorders: programs in the place of Slurm's that write down how they were called."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from pipeline.config import ClusterConfig, EncodeConfig, EngineConfig, RunConfig, TrainConfig, UNetConfig
from pipeline.paths import RunPaths

RUN = RunPaths(Path("/scratch/runs/tiny"))


def run_config(name: str = "tiny", engine: dict[str, Any] | None = None, **cluster: Any) -> RunConfig:
    return RunConfig(
        name=name,
        encode=EncodeConfig(source="shards", image_size=64),
        model=UNetConfig(),
        engine=EngineConfig(**{"global_batch": 64, "micro_batch": 4} | (engine or {})),
        train=TrainConfig(steps=10),
        cluster=ClusterConfig(**cluster),
    )


def directives(script: str) -> dict[str, str]:
    """Return the options as sbatch takes them: up to the first line that is no comment, split as a shell does."""
    found = {}
    for line in script.split("\n"):
        if line.strip() and not line.lstrip().startswith("#"):
            break
        if line.startswith("#SBATCH"):
            (word,) = shlex.split(line.removeprefix("#SBATCH"), comments=True)
            name, _, value = word.removeprefix("--").partition("=")
            assert name not in found
            found[name] = value
    return found


RECORDER = """#!{python} -S
import os, sys
record = os.path.join(os.environ["RECORDS"], f"{{os.path.basename(sys.argv[0])}}-{{os.getpid()}}")
with open(record + ".new", "wb") as stream:
    stream.write(b"\\0".join(map(os.fsencode, sys.argv[1:])))
os.rename(record + ".new", record)
"""
# Stands in for the Python that the batch script hands over to.
SUPERVISOR = (
    RECORDER
    + """
if "PRINT_ENVIRONMENT" in os.environ:
    import json
    print(json.dumps(dict(os.environ)))
"""
)
# Everything that hostile texts below try to start; a record of one of them is an injection.
SLURM = ("srun", "scontrol", "sbatch", "scancel", "squeue")
BAIT = ("id", "touch", "rm", "uname", "sh", "cat", "reboot", "module")


class FakeSlurm:
    """A PATH with nothing but recorders, and the environment of a batch script in it."""

    def __init__(self, folder: Path) -> None:
        self.records, self.programs, self.work = (folder / name for name in ("records", "bin", "work"))
        for made in (self.records, self.programs, self.work):
            made.mkdir()
        for name, text in {"supervisor": SUPERVISOR, **dict.fromkeys((*SLURM, *BAIT), RECORDER)}.items():
            program = self.programs / name
            program.write_text(text.format(python=sys.executable))
            program.chmod(0o755)
        sleep = self.programs / "sleep"
        sleep.write_text(f"#!{sys.executable} -S\nimport time; time.sleep(0.2)\n")
        sleep.chmod(0o755)
        self.environment = {
            "PATH": str(self.programs),
            "RECORDS": str(self.records),
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NODELIST": "gpu-[07-08]",
            "SLURM_SUBMIT_DIR": str(self.work),
            "SLURM_CPUS_PER_TASK": "3",
        }

    def start(self, script: str, **environment: str) -> "subprocess.Popen[str]":
        file = self.work.parent / "job.sh"
        file.write_bytes(script.encode())
        return subprocess.Popen(
            ["/bin/bash", str(file)],
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            cwd="/",
        )

    def run(self, script: str, **environment: str) -> tuple[int, str]:
        process = self.start(script, **environment)
        output, _ = process.communicate(timeout=30)
        return process.returncode, output

    def calls(self, name: str) -> list[list[str]]:
        found = sorted(self.records.glob(f"{name}-*"), key=lambda file: file.stat().st_mtime_ns)
        return [[os.fsdecode(word) for word in file.read_bytes().split(b"\0")] for file in found]

    def started(self) -> set[str]:
        return {file.name.rsplit("-", 1)[0] for file in self.records.glob("*-*[0-9]")}

    def forget(self) -> None:
        for file in self.records.iterdir():
            file.unlink()


def task_of(call: list[str]) -> list[str]:
    """Return the command behind the supervisor's own words."""
    assert call[:2] == ["-m", "launch.supervisor"]
    return call[call.index("--") + 1 :]
