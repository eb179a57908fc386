"""From the config to open data sets: one or several, in folders or in an object store."""

import logging
import os
import tempfile
from pathlib import Path

from pipeline import storage
from pipeline.config import DataConfig
from pipeline.data.cache import NodeCache
from pipeline.data.remote import RemoteShards, copy_tables
from pipeline.latents.manifest import MANIFEST_NAME
from pipeline.latents.reader import LatentDataset

logger = logging.getLogger(__name__)


def open_datasets(
    data: DataConfig, default: Path, split: str = "train", *, rank: int = 0, world_size: int = 1
) -> list[LatentDataset]:
    """Return the data sets that the config names, in its order; without any the one in the folder `default`.

    Raises:
        DataError: a data set is missing, damaged or not finished.
        OSError: a store does not answer.
    """
    places = _places(data, default)
    return [open_dataset(place, data, split, rank=rank, world_size=world_size) for place in places]


def known_datasets(data: DataConfig, default: Path, split: str = "train") -> list[LatentDataset]:
    """Return those of `open_datasets` that are still there, and say aloud which are not: a model outlives its data.

    Raises:
        DataError: a data set is there and damaged.
        OSError: a store does not answer.
    """
    found = []
    for place in _places(data, default):
        remote = storage.is_remote(place)
        if storage.exists(storage.join(place, MANIFEST_NAME)) if remote else Path(place).exists():
            found.append(open_dataset(place, data, split))
        else:
            logger.warning("%s is not there: nothing can be taken from it or compared with it", place)
    return found


def _places(data: DataConfig, default: Path) -> list[str]:
    return [entry.dataset for entry in data.mix] or [data.dataset or str(default)]


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
