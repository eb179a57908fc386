"""A login node of recorders: Slurm's commands with prepared answers, and a list of how they were called."""

import json
import sys
from pathlib import Path

import pytest

PROGRAM = """#!{python} -S
import json, os, sys
folder = {folder!r}
name, words = os.path.basename(sys.argv[0]), sys.argv[1:]
with open(os.path.join(folder, "calls.jsonl"), "a") as stream:
    stream.write(json.dumps([name, *words]) + "\\n")
answers = json.load(open(os.path.join(folder, "answers.json")))
for answer in answers.get(name, []):
    if all(any(part in word for word in words) for part in answer["when"]):
        break
else:
    answer = {{"out": "", "error": "", "code": 0}}
out = answer["out"]
if out == "NEXT":
    counter = os.path.join(folder, "job")
    number = int(open(counter).read()) + 1 if os.path.exists(counter) else 101
    open(counter, "w").write(str(number))
    out = f"{{number}}\\n"
sys.stdout.write(out)
sys.stderr.write(answer["error"])
sys.exit(answer["code"])
"""
COMMANDS = ("sbatch", "squeue", "scontrol", "sacct", "scancel")
CONFIG = "KillWait                = 30 sec\n"


class LoginNode:
    """The commands, with the answers of a cluster that is idle and takes every job, until told otherwise."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.programs = folder / "bin"
        self.programs.mkdir(parents=True)
        for name in COMMANDS:
            self.install(name)
        self._answers: dict[str, list[dict[str, object]]] = {}
        self.answer("sbatch", out="NEXT")
        self.answer("sbatch", "--test-only")
        self.answer("scontrol", "config", out=CONFIG)
        self.answer("scontrol", "partition", out="PartitionName=train GraceTime=10 State=UP\n")
        self.answer("scontrol", "job", error="slurm_load_jobs error: Invalid job id specified\n", code=1)
        self.answer("sacct", error="Slurm accounting storage is disabled\n", code=1)

    def install(self, name: str) -> None:
        program = self.programs / name
        program.write_text(PROGRAM.format(python=sys.executable, folder=str(self.folder)))
        program.chmod(0o755)

    def answer(self, name: str, *when: str, out: str = "", error: str = "", code: int = 0) -> None:
        """From now on answer so, where each of `when` is part of some word; the newest fitting answer counts."""
        entry: dict[str, object] = {"when": list(when), "out": out, "error": error, "code": code}
        self._answers.setdefault(name, []).insert(0, entry)
        (self.folder / "answers.json").write_text(json.dumps(self._answers))

    def calls(self, name: str) -> list[list[str]]:
        """Return the words of each call of a command, in order."""
        record = self.folder / "calls.jsonl"
        lines = record.read_text().splitlines() if record.exists() else []
        return [words[1:] for words in map(json.loads, lines) if words[0] == name]


def login_node(folder: Path, monkeypatch: pytest.MonkeyPatch) -> LoginNode:
    """Return a login node whose commands are all that is on the PATH: this machine may have a Slurm of its own."""
    node = LoginNode(folder / "login")
    monkeypatch.setenv("PATH", str(node.programs))
    return node
