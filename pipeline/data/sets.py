"""From the config to open data sets: one or several, in folders or in an object store."""

import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pipeline import storage
from pipeline.config import DataConfig
from pipeline.data.cache import NodeCache
from pipeline.data.remote import RemoteShards, copy_tables
from pipeline.errors import DataError
from pipeline.latents.reader import LatentDataset
from pipeline.publish import json_digest

logger = logging.getLogger(__name__)


def open_datasets(
    data: DataConfig, default: Path, split: str = "train", *, rank: int = 0, world_size: int = 1
) -> list[LatentDataset]:
    """Return the data sets that the config names, in its order; without any the one in the folder `default`.

    Raises:
        DataError: a data set is missing, damaged or not finished.
        OSError: a store does not answer.
    """
    places = [entry.dataset for entry in data.mix] or [data.dataset or str(default)]
    return [open_dataset(place, data, split, rank=rank, world_size=world_size) for place in places]


def open_dataset(
    place: str, data: DataConfig, split: str = "train", *, rank: int = 0, world_size: int = 1
) -> LatentDataset:
    """Return the split of the data set at `place`, a folder or a URL. Raises as `open_datasets`."""
    if not storage.is_remote(place):
        return LatentDataset(Path(place), split, rank=rank, world_size=world_size)
    folder = cache_folder(data)
    tables = copy_tables(place, folder)
    cache = NodeCache(folder, int(data.cache_gib * 2**30)) if data.remote_reads == "shard" else None
    shards = RemoteShards(place, tables, cache)
    return LatentDataset(tables, split, shards=shards, rank=rank, world_size=world_size)


def cache_folder(data: DataConfig) -> Path:
    """Return the folder of this node for what comes from stores; users do not share one unless they say so."""
    return Path(data.cache or Path(tempfile.gettempdir()) / f"ldm-cache-{os.getuid()}")


def data_origin(before: str, now: str, origin: int, consumed: int, *, accept_change: bool) -> int:
    """Return the position of the run at which the first epoch of its data begins, for a resume at `consumed`.

    `before` is the data digest in the checkpoint, `now` that of the config's data, `origin` what the checkpoint
    recorded. A change that is accepted starts a new epoch where the run stands; samples seen before may come again.

    Raises:
        DataError: the data is another, and that was not accepted.
    """
    if before == now:
        return origin
    if not accept_change:
        raise DataError(
            f"the checkpoint was trained on the data set {before[:16]}, the config's is {now[:16]}; give back the old "
            "one, use another run name, or start a new epoch of the new one with --accept-data-change"
        )
    logger.warning(
        "data changed from %s to %s: a new epoch starts at position %d", before[:16], now[:16], consumed
    )
    return consumed


def data_digest(sets: Sequence[LatentDataset], data: DataConfig) -> str:
    """Return what says that two runs read the same: the manifest's digest, or one over all sets and weights."""
    if len(sets) == 1:
        return sets[0].manifest.digest
    weights = [entry.weight for entry in data.mix]
    return json_digest([[dataset.manifest.digest for dataset in sets], weights])
