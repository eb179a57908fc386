"""The denoiser of a run as a checkpoint holds it, for everything that measures, paints or hands over."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from pipeline.average import made_weights
from pipeline.config import RunConfig
from pipeline.errors import CheckpointError
from pipeline.models.unet import UNet
from pipeline.paths import RunPaths
from pipeline.training.saving.checkpoint import load_weights, newest_checkpoint, read_manifest

Weights = str
"""A name of weights: "raw", "ema", what else the checkpoint holds, or what `ldm ema` has made."""


@dataclass(frozen=True)
class TrainedNetwork:
    """The denoiser as one checkpoint holds it, and where it comes from."""

    network: UNet
    config: RunConfig
    """The config that the checkpoint was trained with."""
    weights: Weights
    checkpoint: Path
    step: int
    samples: int
    """Training samples consumed."""
    data_digest: str

    @classmethod
    def load(cls, checkpoint: Path, weights: Weights, device: torch.device | str) -> Self:
        """Return the network of a verified checkpoint in eval mode, float32 on `device`.

        Raises:
            CheckpointError: when its weights do not fit the model that its own config describes.
            ConfigError: when it holds no such weights.
        """
        state = load_weights(checkpoint, weights, verified=True)
        return cls._of(checkpoint, read_manifest(checkpoint), state, weights, device)

    @classmethod
    def each(cls, run: RunPaths, kinds: Sequence[Weights], device: torch.device | str) -> Iterator[Self]:
        """Yield the run's network under each of `kinds`: what `ldm ema` has made by that name, or else of its newest
        checkpoint whose every byte is right.

        Raises:
            CheckpointError: when there is no checkpoint, or weights are damaged or do not fit.
            ConfigError: when there are no such weights.
        """
        checkpoint = newest_checkpoint(run.checkpoints)
        for weights in kinds:
            made = run.weights / Path(weights).name
            if made.name == weights and made.is_dir():
                yield cls._of(made, *made_weights(made), weights, device)
            else:
                yield cls.load(checkpoint, weights, device)

    @classmethod
    def _of(
        cls,
        checkpoint: Path,
        manifest: Mapping[str, Any],
        state: Mapping[str, Tensor],
        weights: Weights,
        device: torch.device | str,
    ) -> Self:
        config = RunConfig.model_validate_json(json.dumps(manifest["config"]))
        network = UNet(config.model)
        try:
            network.load_state_dict(state, strict=True)
        except RuntimeError as error:
            said = " ".join(str(error).split())[:300]
            raise CheckpointError(
                f"{checkpoint}: its {weights} weights do not fit its config: {said}"
            ) from None
        network.to(device).eval().requires_grad_(False)
        step, samples, data_digest = (manifest[name] for name in ("step", "samples", "data_digest"))
        return cls(network, config, weights, checkpoint, step, samples, data_digest)

    @classmethod
    def newest(cls, run: RunPaths, weights: Weights, device: torch.device | str) -> Self:
        """Return the only network of `each`. Raises what `each` raises."""
        return next(cls.each(run, [weights], device))
