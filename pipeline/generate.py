"""Prompts -> text states -> latents -> pictures, with the weights of the newest verified checkpoint.

A picture is a function of (weights, prompt, seed, picture number, sampler settings): its noise is drawn by
counter, so neither the batch it is painted in nor its neighbours matter. Nothing here depends on the world size
that the weights were trained with.

Shape letters: B pictures, C latent channels, H W latent sides, N pictures in all.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from pipeline.config import ObjectiveConfig, SampleConfig
from pipeline.data.changes import data_digest
from pipeline.data.sets import known_datasets
from pipeline.diffusion import draws
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.guidance import GuidedNetwork
from pipeline.diffusion.posterior import unscale_latents
from pipeline.diffusion.samplers import Generators, make_sampler, sampling_timesteps, step_back
from pipeline.errors import DataError
from pipeline.latents.reader import LatentDataset
from pipeline.models.autoencoder import FrozenAutoencoder
from pipeline.models.pixels import pixels_from_images
from pipeline.models.text_memory import text_remembered
from pipeline.models.text_pair import TextEncoder, load_text_encoder
from pipeline.paths import RunPaths, autoencoder_folder, text_encoder_folder
from pipeline.trained_network import TrainedNetwork, Weights

logger = logging.getLogger(__name__)

Watch = Callable[[float, Tensor, Tensor], None]
"""Told of each step: its time, what the network was given, and its guided prediction."""
PICTURES_AT_ONCE = 16
# Share of the largest null state by which ours may differ from the stored one: fp16 storage, other devices.
NULL_TOLERANCE = {"fp32": 0.005, "bf16": 0.05}


class Generator:
    """Paints pictures from prompts: denoiser, text encoder and autoencoder of one run, proven to belong together."""

    def __init__(
        self, trained: TrainedNetwork, autoencoder: FrozenAutoencoder, text_encoder: TextEncoder
    ) -> None:
        self.trained = trained
        self.autoencoder, self.text_encoder = autoencoder, text_encoder
        self.null_text = self.text([""])

    @classmethod
    def load(cls, run: RunPaths, weights: Weights = "ema", device: torch.device | str | None = None) -> Self:
        """Return the generator of the run's newest checkpoint; `device` None takes a GPU if there is one.

        Raises:
            CheckpointError: when there is no valid checkpoint.
            DataError: when the encoders are not those that made the data it was trained on.
        """
        device = default_device() if device is None else device
        return cls.of_run(TrainedNetwork.newest(run, weights, device), run, device)

    @classmethod
    def of_run(cls, trained: TrainedNetwork, run: RunPaths, device: torch.device | str) -> Self:
        """Return the generator of a network of `run`, with the encoders that its config names.

        Raises:
            DataError: when the encoders are not those that made the data it was trained on.
        """
        config = trained.config
        generator = cls(
            trained,
            FrozenAutoencoder.load(autoencoder_folder(config, run), device),
            # Text states in the precision that the network was trained on.
            load_text_encoder(config.encode, text_encoder_folder(config, run), device),
        )
        generator.refuse_mismatch(run)
        return generator

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return next(self.trained.network.parameters()).device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the latents that are painted by default: square, `model.sample_size` a side."""
        model = self.trained.config.model
        return (model.in_channels, model.sample_size, model.sample_size)

    def paint(
        self, prompts: Sequence[str], *, seed: int, sample: SampleConfig, first_picture: int = 0
    ) -> np.ndarray:
        """Return a picture a prompt, uint8 [N, height, width, 3]; the first has the number `first_picture`."""
        parts = list(self.paint_in_parts(prompts, seed=seed, sample=sample, first_picture=first_picture))
        side = self.latent_shape[1] * self.autoencoder.downsampling
        return np.concatenate(parts) if parts else np.zeros((0, side, side, 3), np.uint8)

    def paint_in_parts(
        self, prompts: Sequence[str], *, seed: int, sample: SampleConfig, first_picture: int = 0
    ) -> Iterator[np.ndarray]:
        """Yield the same pictures as `paint`, at most 16 at once, in order."""
        for first in range(0, len(prompts), PICTURES_AT_ONCE):
            part = prompts[first : first + PICTURES_AT_ONCE]
            numbers = range(first_picture + first, first_picture + first + len(part))
            noise_BCHW, generators = self.noise(numbers, seed), self.generators(numbers, seed)
            yield pixels_from_images(self.images(part, noise_BCHW, sample, generators))

    def noise(self, pictures: Sequence[int], seed: int) -> Tensor:
        """Return the noise that each numbered picture begins with, float32 [B, C, H, W]."""
        parts = [draws.normal(seed, k, draws.Purpose.PICTURE, self.latent_shape) for k in pictures]
        return torch.from_numpy(np.stack(parts)).to(self.device)

    def generators(self, pictures: Sequence[int], seed: int) -> Generators:
        """Return the generator of each numbered picture, on the CPU, for samplers that add noise on the way."""
        return [torch.Generator().manual_seed(draws.picture_seed(seed, k)) for k in pictures]

    def images(
        self,
        prompts: Sequence[str],
        noise_BCHW: Tensor,
        sample: SampleConfig,
        generators: Generators = (),
        watch: Watch | None = None,
    ) -> Tensor:
        """Return images in [-1, 1], float32 [B, 3, height, width], for prompts and the noise they begin with."""
        return self.decoded(self.denoise(noise_BCHW, self.text(prompts), sample, generators, watch))

    def decoded(self, latents_BCHW: Tensor) -> Tensor:
        """Return scaled latents as images in [-1, 1], float32 [B, 3, height, width]."""
        encoder = self.autoencoder
        return encoder.decode(unscale_latents(latents_BCHW, encoder.scaling_factor, encoder.shift_factor))

    def under(self, trained: TrainedNetwork) -> "Generator":
        """Return the generator with another network of the same run."""
        return Generator(trained, self.autoencoder, self.text_encoder)

    def text(self, prompts: Sequence[str]) -> Conditioning:
        """Return the text of prompts on the device, its pooled part for SDXL alone; a prompt that is cut is said."""
        tokens_BL, truncated_B = self.text_encoder.tokenize(prompts)
        for prompt, truncated in zip(prompts, truncated_B.tolist(), strict=True):
            if truncated:
                logger.warning("prompt cut to %d tokens: %.80s", self.text_encoder.max_tokens, prompt)
        text_BLD, pooled_BP = self.text_encoder.encode_pooled(tokens_BL)
        if not self._is_sdxl:
            return Conditioning(text_BLD.to(self.device))
        assert pooled_BP is not None, "the data set that the network learned from has pooled text"
        return Conditioning(text_BLD.to(self.device), pooled_BP.to(self.device))

    @torch.no_grad()
    def denoise(
        self,
        noise_BCHW: Tensor,
        text: Conditioning,
        sample: SampleConfig,
        generators: Generators = (),
        watch: Watch | None = None,
    ) -> Tensor:
        """Return scaled latents, float32 [B, C, H, W], sampled under classifier-free guidance.

        Guidance leads away from the null text or the negative prompt. `generators`, one a picture, give the noise
        that stochastic samplers add.
        """
        denoiser = self.trained.network
        away = self.text([sample.negative_prompt]) if sample.negative_prompt else self.null_text
        towards, away = (self._sized(part, noise_BCHW) for part in (text, away.expanded(len(noise_BCHW))))
        network = GuidedNetwork(denoiser, towards, away, sample)
        with text_remembered(denoiser):
            return paint_latents(
                network, noise_BCHW, self.trained.config.objective, sample, generators, watch
            )

    def _sized(self, text: Conditioning, noise_BCHW: Tensor) -> Conditioning:
        """Return the text with what SDXL is told of the picture: all of an original of the size that is painted."""
        if not self._is_sdxl:
            return text
        height, width = (side * self.autoencoder.downsampling for side in noise_BCHW.shape[2:])
        sizes_6 = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32, device=self.device)
        return replace(text, time_ids_BS=sizes_6.expand(len(noise_BCHW), -1))

    @property
    def _is_sdxl(self) -> bool:
        return self.trained.config.model.addition_embed_type is not None

    def refuse_mismatch(self, run: RunPaths) -> None:
        """Do nothing if the encoders are those that made the data that the network of `run` was trained on.

        A data set that is no longer there (a model outlives its cache) cannot be compared: that is said aloud.

        Raises:
            DataError: naming each field that differs, with both values.
        """
        data = self.trained.config.data
        known = known_datasets(data, run.latents)
        if len(known) == max(1, len(data.mix)):
            where = ", ".join(str(dataset.folder) for dataset in known)
            refuse_differences(where, {"digest": (data_digest(known, data), self.trained.data_digest)})
        for dataset in known[:1]:  # All of a mixture have one spec and one set of encoders.
            self._refuse_other_encoders(dataset)
            self._refuse_other_null_text(dataset)
        for dataset in known:
            dataset.close()

    def _refuse_other_encoders(self, dataset: LatentDataset) -> None:
        encoder, spec = dataset.manifest.encoder, dataset.spec
        autoencoder, text_encoder = self.autoencoder, self.text_encoder
        refuse_differences(
            dataset.folder,
            {
                "encoder.autoencoder": (encoder["autoencoder"], autoencoder.digest),
                "encoder.text_encoder": (encoder["text_encoder"], text_encoder.digest),
                "encoder.tokenizer": (encoder["tokenizer"], text_encoder.tokenizer_digest),
                "spec.scaling_factor": (spec.scaling_factor, autoencoder.scaling_factor),
                "spec.shift_factor": (spec.shift_factor, autoencoder.shift_factor),
            },
        )

    def _refuse_other_null_text(self, dataset: LatentDataset) -> None:
        """The network learned to paint without a caption from the stored null text: guidance must use the same."""
        stored = dataset.null_text()
        tokens_1L = self.text_encoder.tokenize([""])[0].numpy()
        if not np.array_equal(stored["tokens"].astype(np.int64), tokens_1L):
            raise DataError(
                f"{dataset.folder}/null/tokens.npy: is not what the text encoder makes of an empty caption"
            )
        for name, part in (("text", self.null_text.text_BLD), ("pooled", self.null_text.pooled_BP)):
            if name not in stored or part is None:
                continue
            ours = part.cpu().numpy()
            difference = float(np.abs(stored[name].astype(np.float32) - ours).max())
            allowed = NULL_TOLERANCE[self.trained.config.encode.precision] * float(np.abs(ours).max())
            if not difference <= allowed:
                raise DataError(
                    f"{dataset.folder}/null/{name}.npy: differs by {difference:.3g} from the text encoder's empty caption, "
                    f"at most {allowed:.3g} is rounding; encode the data set again"
                )


@torch.no_grad()
def paint_latents(
    network: GuidedNetwork,
    noise_BCHW: Tensor,
    objective: ObjectiveConfig,
    sample: SampleConfig,
    generators: Generators = (),
    watch: Watch | None = None,
) -> Tensor:
    """Return scaled latents, float32 [B, C, H, W]: the schedule of `objective` run backwards from the noise."""
    height, width = noise_BCHW.shape[2:]
    sampler = make_sampler(sample.sampler, objective, height * width)
    times = sampling_timesteps(sampler, sample.steps)
    z_BCHW = noise_BCHW * sampler.init_noise_sigma
    for time in times:
        scaled_BCHW = sampler.scale_model_input(z_BCHW, time)
        predicted_BCHW = network(scaled_BCHW, time, float(time) / objective.timesteps)
        if watch is not None:
            watch(float(time), scaled_BCHW, predicted_BCHW)
        z_BCHW = step_back(sampler, predicted_BCHW, time, z_BCHW, generators)
    return z_BCHW


def default_device() -> torch.device:
    """Return the GPU if torch sees one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def refuse_differences(dataset: Path | str, fields: dict[str, tuple[str | float, str | float]]) -> None:
    """Do nothing if each field's (data set's value, ours) are equal.

    Raises:
        DataError: naming each field that differs, with both values.
    """
    wrong = [
        f"{name} is {theirs!r} in the data set, {ours!r} here"
        for name, (theirs, ours) in fields.items()
        if not (theirs == ours or (isinstance(ours, float) and math.isclose(float(theirs), ours)))
    ]
    if wrong:
        raise DataError(f"{dataset}: {'; '.join(wrong)}; use the encoders and data of the training")
