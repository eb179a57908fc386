"""Crowds of encode workers without torch: this process loads everything once, each worker is a fork of it.

python -m tests.faults.precompute_main CASE FOLDER [NUMBER]     prints what was seen as JSON
"""

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.modules["torch"] = None  # type: ignore[assignment]  # nothing here may load it

from pipeline.publish import TEMPORARY_MARK
from preprocessing.encoded import EncodedBatch
from preprocessing.leases import leased
from preprocessing.roster import Work, encode_shards
from preprocessing.samples import InputShard
from preprocessing.sources import list_shards
from tests.faults.outcome import ended_within
from tests.preprocessing.builders import NumpyEncoder, encode_config, image_file, noise, write_input
from tests.preprocessing.encode_process import contents

LIMIT_SECONDS = 120.0


class SlowEncoder(NumpyEncoder):
    """Waits before each batch, so that what is done to a worker meets it in the middle of its work."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def encode(self, images: Any, captions: Sequence[tuple[str, ...]]) -> EncodedBatch:
        time.sleep(self.seconds)
        return super().encode(images, captions)


def tiny_input(folder: Path, shards: int, samples: int) -> list[InputShard]:
    """Write shards of a few 8 px pictures and return them."""
    for stem in range(shards):
        files = []
        for key in (f"{stem:05d}{place:04d}" for place in range(samples)):
            files += [(f"{key}.png", image_file(noise(int(key), 8, 8))), (f"{key}.txt", f"no {key}".encode())]
        write_input(folder, {f"{stem:05d}": files})
    return list_shards(folder)


def encode(work: Work, seconds: float = 0.0, lease_seconds: float = 2.0) -> int:
    """Work as one worker and return how many shards it encoded itself."""
    config = encode_config(
        image_size=8, lease_seconds=lease_seconds, decode_threads=1, shards_at_once=1, validation_samples=0
    )
    return encode_shards(work, SlowEncoder(seconds), config).encoded


def forked(action: Callable[[], object]) -> int:
    """Return the pid of a fork that runs `action` and leaves with 0, or with 1 and a traceback."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return child


def ended(child: int) -> int:
    """Wait for the fork and return its exit code, minus the signal that ended it."""
    if not ended_within(child, LIMIT_SECONDS):
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def leftovers(out: Path) -> list[str]:
    """Return temporary files and leases that nobody owns any more."""
    return [str(path) for path in out.rglob("*") if TEMPORARY_MARK in path.name or path.suffix == ".lease"]


def kills(folder: Path, number: int) -> dict[str, Any]:
    """Kill -9 workers at random instants, each going on where the others stopped; look after every kill."""
    shards = tiny_input(folder / "in", 6, 7)
    encode(Work(shards, folder / "straight"))
    straight, out, draw = contents(folder / "straight"), folder / "out", random.Random(0)
    killed = completed = in_the_middle = 0
    while killed < number:
        child = forked(lambda: encode(Work(shards, out), seconds=0.01))
        time.sleep(draw.uniform(0.0, 0.15))
        os.kill(child, signal.SIGKILL)
        code = ended(child)
        killed += code == -signal.SIGKILL
        found = contents(out) if out.exists() else {}
        in_the_middle += 0 < len(found) < len(straight)
        for name, content in found.items():
            assert content == straight[name], f"kill {killed} left {name} that is not what it should be"
        if code == 0 or len(found) == len(straight):
            completed += 1
            shutil.rmtree(out)
    assert ended(forked(lambda: encode(Work(shards, out)))) == 0
    same = contents(out) == straight
    return {
        "kills": killed,
        "in_the_middle": in_the_middle,
        "completed": completed,
        "same": same,
        "left": leftovers(out),
    }


def stopped(folder: Path, number: int) -> dict[str, Any]:
    """SIGSTOP a worker in the middle of a shard, let its lease run out, let another finish, then wake it up."""
    shards = tiny_input(folder / "in", 4, 9)
    encode(Work(shards, folder / "straight"))
    out = folder / "out"
    sleeper = forked(lambda: encode(Work(shards, out), seconds=0.3, lease_seconds=1.0))
    deadline = time.monotonic() + LIMIT_SECONDS
    while not leased(out) and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.1)
    os.kill(sleeper, signal.SIGSTOP)
    held = sorted(leased(out))
    done: dict[str, int] = {}
    began = time.monotonic()
    done["other"] = ended(forked(lambda: encode(Work(shards, out), lease_seconds=1.0)))
    waited = time.monotonic() - began
    before = {path: path.stat().st_ino for path in out.rglob("*") if path.is_file()}
    os.kill(sleeper, signal.SIGCONT)
    done["sleeper"] = ended(sleeper)
    after = {path: path.stat().st_ino for path in out.rglob("*") if path.is_file()}
    return {
        "codes": done,
        "held": held,
        "waited": waited,
        "untouched": before == after,
        "same": contents(out) == contents(folder / "straight"),
        "left": leftovers(out),
    }


def crowd(folder: Path, number: int) -> dict[str, Any]:
    """Start `number` workers at once on ten times as many tiny shards; count who encoded what."""
    shards = tiny_input(folder / "in", 10 * number, 1)
    encode(Work(shards, folder / "straight"))
    (folder / "counts").mkdir()

    def work(worker: int) -> None:
        count = encode(Work(shards, folder / "out", worker, number), lease_seconds=60.0)
        (folder / "counts" / str(worker)).write_text(str(count))

    codes = [
        ended(child) for child in [forked(lambda worker=worker: work(worker)) for worker in range(number)]
    ]
    encoded = [int(path.read_text()) for path in (folder / "counts").iterdir()]
    return {
        "workers": len(encoded),
        "shards": len(shards),
        "encoded": sum(encoded),
        "failed": sum(map(bool, codes)),
        "same": contents(folder / "out") == contents(folder / "straight"),
        "left": leftovers(folder / "out"),
    }


def two_sets(folder: Path, number: int) -> dict[str, Any]:
    """Start two full sets of `number` workers on one output: each set knows nothing of the other."""
    shards = tiny_input(folder / "in", 12, 6)
    encode(Work(shards, folder / "straight"))
    children = [
        forked(lambda worker=worker: encode(Work(shards, folder / "out", worker, number), seconds=0.01))
        for _ in range(2)
        for worker in range(number)
    ]
    codes = [ended(child) for child in children]
    same = contents(folder / "out") == contents(folder / "straight")
    return {"codes": codes, "same": same, "left": leftovers(folder / "out")}


CASES = {"kills": kills, "stopped": stopped, "crowd": crowd, "two_sets": two_sets}

if __name__ == "__main__":
    os.environ["LDM_QUIET"] = "1"
    print(json.dumps(CASES[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))))
