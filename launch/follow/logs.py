"""`ldm logs`: what one rank said, or what the jobs themselves said, across all attempts."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.paths import RunPaths

POLL_SECONDS = 0.5
# srun --label writes `3: ` before each line of rank 3, padded to the width of the largest rank.
LABEL = re.compile(r"^ *0*(\d+): ?(.*)$")


def log_lines(run: RunPaths, rank: int | None, *, follow: bool = False) -> Iterator[str]:
    """Yield the lines of `rank` without its number, or of the batch scripts where rank is None, oldest file first.

    With `follow` it goes on with what is written later, and ends only with its reader.

    Raises:
        ConfigError: when there is no log, or not a line of that rank.
    """
    pattern = "job-*.txt" if rank is None else "**/node-*.txt"
    offsets: dict[Path, int] = {}
    found = False
    while True:
        files = sorted(run.log.glob(pattern), key=lambda path: (path.stat().st_mtime, path.name))
        for path in files:
            for line in _new_lines(path, offsets):
                text = line if rank is None else _of_rank(line, rank)
                if text is not None:
                    found = True
                    yield text
        if not follow:
            break
        time.sleep(POLL_SECONDS)
    if not found:
        what = "no log of a job" if rank is None else f"no line of rank {rank}"
        raise ConfigError(f"{run.log}: {what} in {pattern}; jobs of `ldm submit` write there once they run")


def _new_lines(path: Path, offsets: dict[Path, int]) -> Iterator[str]:
    """Yield the whole lines behind what was read before; a line that is still being written waits for its end."""
    with path.open("rb") as stream:
        stream.seek(offsets.get(path, 0))
        for line in stream:
            if not line.endswith(b"\n"):
                return
            offsets[path] = offsets.get(path, 0) + len(line)
            yield line.decode(errors="replace").rstrip("\n")


def _of_rank(line: str, rank: int) -> str | None:
    match = LABEL.match(line)
    return match[2] if match and int(match[1]) == rank else None
