"""How the ranks of one attempt ended: a record each, written by the parent of the rank on its node.

srun's own code is the highest of all tasks, so that it says neither who failed first nor whether all have ended well.
A rank that was killed cannot write; its parent, three lines of bash, can.
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from signal import Signals

from pipeline.errors import NoProgressError, StoppedError
from pipeline.paths import RunPaths

# 2 to 6: running again changes nothing (pipeline.errors).
FINAL_CODES = range(2, NoProgressError.exit_code + 1)
STOP_SIGNAL_CODES = frozenset(128 + number for number in (Signals.SIGUSR2, Signals.SIGTERM, Signals.SIGINT))

# Arguments: folder of the records, then the rank's command. Traps are reset in what bash starts, so that the rank gets
# the signals that Slurm sends to every process of the step, while bash waits for it; CONT stays untrapped, since bash
# loses the signal that comes with it.
RANK_PARENT = """\
trap : USR1 USR2 TERM INT HUP
records=$1; shift
mkdir -m 700 "$LDM_LOCAL" 2>/dev/null
[[ -O $LDM_LOCAL && ! -L $LDM_LOCAL ]] || { echo "not ours: $LDM_LOCAL" >&2; exit 1; }
mkdir -p "$TORCH_EXTENSIONS_DIR" "$TRITON_CACHE_DIR"
"$@"
code=$?
beside=$records/.$SLURM_PROCID.$$
printf '{"rank": %d, "code": %d, "node": "%s", "time": %s}\\n' \\
  "$SLURM_PROCID" "$code" "$SLURMD_NODENAME" "$EPOCHREALTIME" > "$beside" &&
  mv "$beside" "$records/rank-$SLURM_PROCID.json"
[[ $SLURM_LOCALID == 0 ]] && rm -rf "$LDM_LOCAL"
exit "$code"
"""


@dataclass(frozen=True)
class Exit:
    """How one rank ended: its code (128 + n for signal n), where, and when by that node's clock."""

    rank: int
    code: int
    node: str
    time: float

    @property
    def by_signal(self) -> str:
        """The name of the signal that ended it, or nothing."""
        try:
            return Signals(self.code - 128).name if self.code > 128 else ""
        except ValueError:
            return ""

    def __str__(self) -> str:
        """Return rank, node and how it ended."""
        how = f"killed by {self.by_signal}" if self.by_signal else f"exit code {self.code}"
        return f"rank {self.rank} on {self.node}: {how}"


class Ending(Enum):
    """How an attempt as a whole has ended."""

    DONE = "done"
    STOPPED = "stopped"
    FINAL = "failed"
    CRASHED = "crashed"


@dataclass(frozen=True)
class Verdict:
    """How an attempt ended, the code to leave with, and who is to blame in one line."""

    ending: Ending
    code: int
    line: str
    node: str = ""


def records_folder(run: RunPaths, attempt: str) -> Path:
    """Return the folder of the exit records of `attempt`."""
    return run.supervisor / "exits" / attempt


def open_records(run: RunPaths, attempt: str, keep: int = 8) -> Path:
    """Make the folder of the records of `attempt`, and remove those of all but the newest `keep` attempts."""
    folder = records_folder(run, attempt)
    folder.mkdir(parents=True, exist_ok=True)
    older = sorted(folder.parent.iterdir(), key=lambda entry: entry.stat().st_mtime)
    for old in older[: -keep - 1]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def read_exits(folder: Path) -> list[Exit]:
    """Return what is recorded so far, in the order of ranks."""
    found = []
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.name.startswith("rank-")]
    for name in names:
        record = json.loads((folder / name).read_text())
        found.append(Exit(record["rank"], record["code"], record["node"], float(record["time"])))
    return sorted(found, key=lambda one: one.rank)


def preflight_file(run: RunPaths, attempt: str, rank: int) -> Path:
    """Return where a rank writes what is wrong with its node."""
    return records_folder(run, attempt) / f"preflight-{rank}.json"


def preflight_problems(folder: Path) -> dict[str, str]:
    """Return what ranks have found wrong with their nodes before the first step, by node."""
    found = {}
    for file in sorted(folder.glob("preflight-*.json")):
        record = json.loads(file.read_text())
        found[str(record["node"])] = "; ".join(record["problems"])
    return found


def first_failure(exits: Sequence[Exit], settle_seconds: float = 1.0) -> Exit | None:
    """Return who failed first; among those within the settling time, one that a signal ended.

    A rank that was killed takes its peers along within milliseconds, and the one killed is the one to name.
    """
    failed = [one for one in exits if one.code not in (0, StoppedError.exit_code)]
    if not failed:
        return None
    first = min(one.time for one in failed)
    near = [one for one in failed if one.time <= first + settle_seconds]
    return min(near, key=lambda one: (not one.by_signal, one.time))


def judge(exits: Sequence[Exit], world_size: int, *, stop_asked: bool) -> Verdict:
    """Return how the attempt ended, from the records of its ranks alone; a rank without a record has not ended well.

    With `stop_asked`, ranks that died of the signal itself, before they could listen, count as stopped.
    """
    codes = {one.rank: one.code for one in exits}
    missing = [rank for rank in range(world_size) if rank not in codes]
    if not missing and not any(codes.values()):
        return Verdict(Ending.DONE, 0, f"all {world_size} ranks have ended well")
    final = [one for one in exits if one.code in FINAL_CODES]
    if final:
        first = min(final, key=lambda one: one.time)
        return Verdict(Ending.FINAL, first.code, str(first), first.node)
    stopped = StoppedError.exit_code
    harmless = {0, stopped, *(STOP_SIGNAL_CODES if stop_asked else ())}
    if not missing and harmless.issuperset(codes.values()):
        return Verdict(Ending.STOPPED, stopped, f"all {world_size} ranks have stopped")
    blamed = first_failure([one for one in exits if one.code not in harmless])
    if blamed:
        return Verdict(Ending.CRASHED, blamed.code, str(blamed), blamed.node)
    if missing:
        return Verdict(Ending.CRASHED, 1, f"ranks without an end of their own: {_some(missing)}")
    return Verdict(Ending.CRASHED, 1, "ranks have ended at odds: " + ", ".join(map(str, exits)))


def _some(ranks: Sequence[int], shown: int = 8) -> str:
    return ", ".join(map(str, ranks[:shown])) + (
        f" and {len(ranks) - shown} more" if len(ranks) > shown else ""
    )
