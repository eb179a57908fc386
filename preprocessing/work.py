"""The verb `encode`: load the two frozen models, list the shards, do this worker's part (see `roster`)."""

from pathlib import Path

import torch

from pipeline.config import RunConfig
from pipeline.errors import ConfigError
from pipeline.models.autoencoder import FrozenAutoencoder
from pipeline.models.text_pair import load_text_encoder
from preprocessing.encoder import PairEncoder
from preprocessing.roster import EncodeCounts, Work, encode_shards
from preprocessing.sources import list_shards


def encode_dataset(
    config: RunConfig,
    *,
    source: Path | str,
    out: Path,
    autoencoder: Path,
    text_encoder: Path,
    worker: int = 0,
    workers: int = 1,
    local_worker: int = 0,
) -> EncodeCounts:
    """Encode the shards of `source` into the data set folder `out` as worker `worker` of `workers`.

    `local_worker` is this worker's number on its machine: which GPU is its own. Safe to run again at any time, on
    any number of machines: finished shards are skipped. `ldm finalize` makes the data set of it.

    Raises:
        ConfigError: when a model folder or setting does not fit.
        DataError, PipelineError: see `encode_shards`.
    """
    if not 0 <= worker < workers:
        raise ConfigError(f"worker {worker} of {workers}: give 0 to {workers - 1}")
    shards = list_shards(source, config.encode)
    device = "cpu"
    if torch.cuda.is_available():
        device = f"cuda:{local_worker % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    encoder = PairEncoder(
        FrozenAutoencoder.load(
            autoencoder, device, config.encode.precision, tile_size=config.encode.tile_size
        ),
        load_text_encoder(config.encode, text_encoder, device),
        config.encode,
        device,
    )
    return encode_shards(Work(shards, out, worker, workers), encoder, config.encode)


def processes_here(config: RunConfig) -> int:
    """Return how many workers this machine is for: `encode.processes`, or one a GPU, or one."""
    return config.encode.processes or max(1, torch.cuda.device_count())
