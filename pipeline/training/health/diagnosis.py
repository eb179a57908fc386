"""What a run that diverged leaves behind: enough to find out why without running it again.

RUN/diagnosis/step-XXXXXXXX/ holds `report.json` (why, samples by key, each rank's losses, norms of every parameter,
versions), `config.yaml`, the last records, and the stacks of every rank. It appears whole or not at all, and a
failure to write it never hides the error that it is about.
"""

import faulthandler
import json
import logging
import tempfile
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from pipeline.latents.record import LatentSample
from pipeline.paths import RunPaths
from pipeline.publish import whole_folder, write_bytes, write_json
from pipeline.training.fragments import Fragments
from pipeline.training.world import World

logger = logging.getLogger(__name__)

LAST_RECORDS = 200


def write_diagnosis(
    paths: RunPaths, step: int, world: World, fragments: Fragments, report: Mapping[str, Any]
) -> Path:
    """Write the bundle of `step` with `report` in it and return its folder; all ranks together.

    The report of rank 0 counts, but for `losses`: those of every rank, in the order of ranks.
    """
    folder = paths.diagnosis / f"step-{step:08d}"
    gathered = world.gather([report.get("losses"), stacks()])
    norms = weight_norms(fragments, world)
    if world.is_first:
        losses, texts = zip(*gathered, strict=True)
        content = {**report, "step": step, "losses": list(losses), "norms": norms}
        try:
            _write(folder, paths, plain_json(content), texts)
        except OSError as error:
            logger.error("%s: not written: %s", folder, error)
    return folder


def _write(folder: Path, paths: RunPaths, content: Any, texts: Sequence[str]) -> None:
    with whole_folder(folder) as beside:
        write_json(beside / "report.json", content)
        for rank, text in enumerate(texts):
            write_bytes(beside / f"stacks-rank-{rank:05d}.txt", text.encode())
        for source in (paths.config, paths.versions):
            if source.is_file():
                write_bytes(beside / source.name, source.read_bytes())
        if paths.metrics.is_file():
            with paths.metrics.open("rb") as stream:
                write_bytes(beside / "records.jsonl", b"".join(deque(stream, LAST_RECORDS)))


def append_event(paths: RunPaths, event: Mapping[str, Any]) -> None:
    """Append one line to the run's `health.jsonl` in one write; rank 0 alone."""
    line = (json.dumps(plain_json(event), allow_nan=False) + "\n").encode()
    try:
        with paths.health.open("ab", buffering=0) as stream:
            stream.write(line)
    except OSError as error:
        logger.error("%s: %s; lost: %s", paths.health, error, line.decode().strip())


class Samples(Protocol):
    """What reads one sample of the split: a data set, or several as one."""

    def read(self, number: int, /) -> LatentSample:
        """Return sample `number`."""
        ...


def keys_of(dataset: Samples, indices: Sequence[int]) -> list[str]:
    """Return the keys of samples of the split, read from the shards: only for steps that went wrong."""
    return [str(dataset.read(index).record["key"]) for index in indices]


def stacks() -> str:
    """Return the stacks of all threads of this process."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace")


def plain_json(value: Any) -> Any:
    """Return JSON data in which numbers that are not finite are their names: JSON has none for them."""
    if isinstance(value, Mapping):
        return {key: plain_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(inner) for inner in value]
    if isinstance(value, float) and not (abs(value) < float("inf")):
        return str(value)
    return value


def weight_norms(fragments: Fragments, world: World) -> Mapping[str, Mapping[str, Any]]:
    """Return for each parameter the L2 norms of master, first and second moment over all ranks, on all of them.

    Gradients are gone when a step was skipped: the first moment is their running mean.
    """
    kinds = ("master", "exp_avg", "exp_avg_sq")
    names = list(fragments.shapes)
    squares = {name: [0.0] * len(kinds) for name in names}
    for one in fragments.owned:
        for place, kind in enumerate(kinds):
            squares[one.name][place] += float(getattr(one, kind).double().square().sum())
    total = iter(world.sum([value for name in names for value in squares[name]]))
    return {name: {kind: next(total) ** 0.5 for kind in kinds} for name in names}
