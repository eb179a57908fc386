"""The verb `encode`: load the two frozen models, list the shards, do this worker's part (see `roster`)."""

from pathlib import Path

import torch

from pipeline.config import RunConfig
from pipeline.errors import ConfigError
from pipeline.models.autoencoder import FrozenAutoencoder
from pipeline.models.text_encoder import FrozenTextEncoder
from preprocessing.encoder import PairEncoder
from preprocessing.roster import EncodeCounts, Work, encode_shards
from preprocessing.sources import list_shards


def encode_dataset(
    config: RunConfig,
    *,
    source: Path,
    out: Path,
    autoencoder: Path,
    text_encoder: Path,
    worker: int = 0,
    workers: int = 1,
) -> EncodeCounts:
    """Encode the shards of `source` into the data set folder `out` as worker `worker` of `workers`.

    Safe to run again at any time, on any number of machines: finished shards are skipped. `ldm finalize` makes
    the data set of it.

    Raises:
        ConfigError: when a model folder or setting does not fit.
        DataError: see `encode_shards`.
    """
    if not 0 <= worker < workers:
        raise ConfigError(f"worker {worker} of {workers}: give 0 to {workers - 1}")
    shards = list_shards(source)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = config.encode.precision
    encoder = PairEncoder(
        FrozenAutoencoder.load(autoencoder, device, precision),
        FrozenTextEncoder.load(text_encoder, device, precision),
        config.encode,
        device,
    )
    return encode_shards(Work(shards, out, worker, workers), encoder, config.encode)
