"""Which network the pictures are compared in: the run's own CLIP, a CLIP folder, or a file of Inception weights."""

from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from pipeline.config import EvaluateConfig
from pipeline.errors import ConfigError
from pipeline.evaluation.clip import ClipImages
from pipeline.evaluation.inception import InceptionFeatures
from pipeline.paths import RunPaths

OWN = "the run's own CLIP"
USERS = "CLIP"


class FeatureNetwork(Protocol):
    """Pictures to feature vectors."""

    name: str
    """What it is, for people: it stands beside every number made with it."""
    digest: str
    """Of its weights."""
    width: int

    def __call__(self, pictures_NHWC: np.ndarray) -> np.ndarray:
        """Return features, float32 [N, width], of pictures uint8 [N, H, W, 3]."""


def open_features(settings: EvaluateConfig, paths: RunPaths, device: torch.device) -> FeatureNetwork:
    """Return the network that `evaluate.features` names, or else the image tower of the run's own CLIP.

    Raises:
        ConfigError: when there is none.
        DataError: when it cannot be read or holds code.
    """
    if settings.features is None:
        return ClipImages(clip_folder(None, paths, "evaluate.features"), OWN, device)
    place = Path(settings.features)
    return (
        ClipImages(place, f"{USERS} of {place}", device)
        if place.is_dir()
        else InceptionFeatures(place, device)
    )


def clip_folder(named: str | None, paths: RunPaths, setting: str) -> Path:
    """Return the folder named, or that of the CLIP trained in the run.

    Raises:
        ConfigError: when the run has trained none.
    """
    if named is not None:
        return Path(named)
    if not (paths.clip / "config.json").is_file():
        raise ConfigError(
            f"{setting}: this run has trained no CLIP ({paths.clip}); name a local CLIP folder of transformers"
        )
    return paths.clip


def distance_name(network: FeatureNetwork) -> str:
    """Return what the Frechet distance in this network may be called: FID only with FID's own network and weights."""
    if isinstance(network, InceptionFeatures) and network.is_published:
        return "FID"
    return f"Frechet distance in {network.name} (not FID)"
