"""A process without torch that encodes with `NumpyEncoder`; it starts in half a second, so tests can afford to kill it.

python -m tests.preprocessing.encode_process sweep SOURCE WORK     kill at every durable call, see below
python -m tests.preprocessing.encode_process encode SOURCE OUT WORKER WORKERS SECONDS_A_BATCH
"""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.modules["torch"] = None  # type: ignore[assignment]  # nothing here may load it

from pipeline.publish import TEMPORARY_MARK
from preprocessing.encoded import EncodedBatch
from preprocessing.roster import Work, encode_shards
from preprocessing.sources import list_shards
from tests.preprocessing.builders import NumpyEncoder, encode_config

DURABLE = ("fsync", "link", "unlink", "rename", "replace")


class SlowEncoder(NumpyEncoder):
    """Waits before each batch, so that a kill meets a worker in the middle of its work."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def encode(self, images: Any, captions: Sequence[tuple[str, ...]]) -> EncodedBatch:
        time.sleep(self.seconds)
        return super().encode(images, captions)


def encode(source: Path, out: Path, worker: int = 0, workers: int = 1, seconds: float = 0.0) -> None:
    encode_shards(Work(list_shards(source), out, worker, workers), SlowEncoder(seconds), encode_config())


def contents(out: Path) -> dict[str, Any]:
    """Return every finished file of the data set; of markers all but what may differ between runs."""
    found: dict[str, Any] = {}
    for path in sorted(out.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(out).parts)
        if path.is_file() and not hidden:
            found[str(path.relative_to(out))] = path.read_bytes()
            if path.suffix == ".json":
                found[str(path.relative_to(out))] = {
                    name: value for name, value in json.loads(path.read_text()).items() if name != "extra"
                }
    return found


def in_child(action: Callable[[], None]) -> int:
    """Return how a forked child that ran `action` ended: 0, or the signal that killed it."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def die_at(number: int) -> None:
    """Make this process kill itself instead of making its `number`-th durable call."""
    calls = 0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return instead

    for name in DURABLE:
        setattr(os, name, counted(getattr(os, name)))


def sweep(source: Path, work: Path) -> dict[str, int]:
    """Kill a worker at every durable call in turn; the next worker must make the same data set out of the rest."""
    encode(source, work / "straight")  # here, not in a child: what libraries load at first use is then shared
    straight = contents(work / "straight")
    kills = leftovers = 0
    for number in range(1, 1000):
        out = work / "killed"
        shutil.rmtree(out, ignore_errors=True)

        def doomed(number: int = number, out: Path = out) -> None:
            die_at(number)
            encode(source, out)

        ended = in_child(doomed)
        for name, content in contents(out).items():
            assert content == straight[name], f"kill {number} left {name} that is not what it should be"
        if ended == 0:
            return {"kills": kills, "leftovers": leftovers}
        assert ended == -signal.SIGKILL, ended
        kills += 1
        leftovers += any(TEMPORARY_MARK in path.name for path in out.rglob("*"))
        assert in_child(lambda out=out: encode(source, out)) == 0  # type: ignore[misc]
        assert contents(out) == straight, f"after kill {number} the data set differs"
        left = [path for path in out.rglob("*") if TEMPORARY_MARK in path.name or path.suffix == ".lease"]
        assert not left, f"kill {number} left {left}"
    raise AssertionError("never came to an end")


if __name__ == "__main__":
    verb, source, target = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    os.environ["LDM_QUIET"] = "1"
    if verb == "sweep":
        print(json.dumps(sweep(source, target)))
    else:
        encode(source, target, int(sys.argv[4]), int(sys.argv[5]), float(sys.argv[6]))
