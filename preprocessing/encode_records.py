"""The records of an encoding, told once it is whole: one for each shard, from what its commit marker says.

Many workers encode at once, come, go and are killed; what is true of each shard is in its marker. So the chart of an
encoding is drawn when the data set is finished, by one process.
"""

import uuid
from pathlib import Path

from pipeline.config import RunConfig
from pipeline.latents.manifest import Manifest
from pipeline.latents.shard import Counts, ShardRecord
from pipeline.paths import RunPaths
from pipeline.tracking import open_records

MOST_RECORDS = 1000


def record_encoding(config: RunConfig, paths: RunPaths, dataset: Path, manifest: Manifest) -> None:
    """Record the shards of the finished `dataset` in the order of their names: step n is what the first n gave.

    Of more than a thousand shards about a thousand are told, the last among them.
    """
    markers = sorted(path for path in dataset.glob("*/*.json") if not path.parent.name.startswith("."))
    every = -(-len(markers) // MOST_RECORDS)
    counts, seconds = Counts(), 0.0
    with open_records(
        paths, config, kind="encode", attempt=f"{manifest.digest[:8]}-{uuid.uuid4().hex[:4]}"
    ) as records:
        for number, marker in enumerate(markers, 1):
            shard = ShardRecord.load(marker)
            counts, seconds = counts.plus(shard.counts), seconds + float(shard.extra.get("seconds", 0.0))
            if number % every and number != len(markers):
                continue
            values = {"read": counts.read, "written": counts.written, "worker_seconds": seconds}
            values |= {"samples_per_worker_second": counts.read / seconds} if seconds else {}
            values |= {f"rejected/{reason}": number for reason, number in counts.rejected.items()}
            values |= {f"failed/{error}": number for error, number in counts.failed.items()}
            records.log(number, values, samples=counts.read)
