"""Pictures painted from validation captions beside real ones: what they have in common, measured in features.

Picture k is painted from validation caption k with noise (seed, k), in pieces of a fixed size that are dealt to the ranks:
the same pixels, and so the same numbers, at any world size. Features and latents alone are kept of them.
Shape letters: N pictures, D features, C H W of a latent.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.config import RunConfig
from pipeline.data.held_out import HeldOut
from pipeline.data.sets import open_datasets
from pipeline.diffusion.posterior import split_moments, unscale_latents
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation.alignment import clip_alignment
from pipeline.evaluation.clip import ClipCaptions, ClipImages, unit
from pipeline.evaluation.distances import frechet, has_frechet_interval, kid
from pipeline.evaluation.manifolds import NEIGHBOURS, precision_recall
from pipeline.evaluation.memorisation import TrainingLatents, flat_means, memorised
from pipeline.evaluation.networks import OWN, USERS, FeatureNetwork, clip_folder, distance_name, open_features
from pipeline.evaluation.references import VALIDATION, reference_files, reference_pictures
from pipeline.evaluation.together import Arrays, agreed, exchanged, from_first, in_turns
from pipeline.generate import Generator
from pipeline.latents.record import LatentSample
from pipeline.models.pixels import pixels_from_images
from pipeline.paths import RunPaths
from pipeline.progress import Progress
from pipeline.training.world import World

PICTURES_AT_ONCE = 8
"""Pictures a piece of work: fixed, so that none differs between world sizes."""
COMPARING = frozenset({"kid", "frechet", "precision_recall"})


@dataclass(frozen=True)
class Judges:
    """The networks that look at pictures; those that no metric asks for are None."""

    features: FeatureNetwork | None
    images: ClipImages | None
    captions: ClipCaptions | None

    @classmethod
    def open(cls, config: RunConfig, paths: RunPaths, device: torch.device) -> "Judges":
        """Load what `evaluate.metrics` needs.

        Raises:
            ConfigError, DataError: one of them is missing or unreadable.
        """
        settings, chosen = config.evaluate, set(config.evaluate.metrics)
        features = open_features(settings, paths, device) if chosen & COMPARING else None
        if "clip" not in chosen:
            return cls(features, None, None)
        folder = clip_folder(settings.clip, paths, "evaluate.clip")
        images = ClipImages(folder, OWN if settings.clip is None else f"{USERS} of {folder}", device)
        return cls(features, images, ClipCaptions(folder, device))


class PictureMetrics:
    """The metrics of pictures that a config asks for, measured by all ranks together."""

    def __init__(self, config: RunConfig, paths: RunPaths, world: World) -> None:
        """Load the judges and look at the reference folder, on all ranks or on none. Raises as `Judges.open`."""
        self._config, self._paths, self._world = config, paths, world
        self._judges = agreed(world, lambda: Judges.open(config, paths, world.device))
        folder = config.evaluate.reference
        self._files = agreed(world, lambda: reference_files(Path(folder)) if folder else [])

    def measure(self, generator: Generator, dataset: HeldOut, progress: Progress) -> dict[str, Any]:
        """Return every metric asked for with its settings and counts, plain JSON data, the same on every rank.

        `dataset` is the validation split. At ZeRO stage 3 all ranks paint equally often.

        Raises:
            ConfigError: when there are fewer than two validation samples.
            DataError: on all ranks, when any cannot read its part.
        """
        count = min(self._config.evaluate.pictures, len(dataset))
        if count < 2:
            raise ConfigError(
                f"evaluate.metrics: {count} pictures can be painted from the validation captions of {dataset.where}, at "
                "least 2 are needed; set encode.validation_samples and encode again, or evaluate.metrics=[]"
            )
        indices = [number * len(dataset) // count for number in range(count)]
        samples = agreed(self._world, lambda: [dataset.read(index) for index in indices])
        captions = [str(sample.record["captions"][0]) for sample in samples]
        found = self._painted(generator, captions, samples, progress)
        real = found.get("real")
        if self._files:
            real = self._of_files(generator)
        measured: dict[str, Any] = from_first(self._world, lambda: self._compare(found, real, captions))
        if "memorisation" in self._config.evaluate.metrics:
            measured["memorisation"] = self._memorisation(
                generator, found["latents"], captions, dataset, samples
            )
        return self._described(generator, captions) | measured

    def _painted(
        self, generator: Generator, captions: list[str], samples: list[LatentSample], progress: Progress
    ) -> Arrays:
        """Return features of painted and real pictures, and the painted latents, row k of caption k."""
        pieces = [
            range(first, min(first + PICTURES_AT_ONCE, len(captions)))
            for first in range(0, len(captions), PICTURES_AT_ONCE)
        ]
        done: dict[int, Arrays] = {}
        for number, numbers, filler in in_turns(self._world, len(pieces), pieces.__getitem__):
            arrays = self._piece(generator, numbers, captions, samples)
            if not filler:
                progress.advance(len(numbers))
            done |= exchanged(self._world, {} if filler else {number: arrays})
        return {name: np.concatenate([done[number][name] for number in sorted(done)]) for name in done[0]}

    @torch.no_grad()
    def _piece(
        self, generator: Generator, numbers: range, captions: list[str], samples: list[LatentSample]
    ) -> Arrays:
        sample, encoder = self._config.sample, generator.autoencoder
        text = generator.text([captions[number] for number in numbers])
        noise = generator.noise(numbers, sample.seed)
        latents = generator.denoise(noise, text, sample, generator.generators(numbers, sample.seed))
        painted = pixels_from_images(
            encoder.decode(unscale_latents(latents, encoder.scaling_factor, encoder.shift_factor))
        )
        real = [self._decoded(generator, samples[number]) for number in numbers]
        found: Arrays = {}
        if "memorisation" in self._config.evaluate.metrics:
            found["latents"] = latents.float().cpu().numpy()
        if self._judges.features is not None:
            found["painted"] = self._judges.features(painted)
            if not self._files:
                found["real"] = _of_each(self._judges.features, real)
        if self._judges.images is not None and self._judges.captions is not None:
            found["clip_painted"] = self._judges.images(painted)
            found["clip_real"] = _of_each(self._judges.images, real)
            found["clip_text"] = self._judges.captions([captions[number] for number in numbers])
        return found

    def _decoded(self, generator: Generator, sample: LatentSample) -> np.ndarray:
        """Return the picture, uint8 [H, W, 3], that the autoencoder makes of the stored posterior mean."""
        encoder = generator.autoencoder
        mean_BCHW, _ = split_moments(torch.from_numpy(np.stack([sample.arrays["latent"]])), encoder.channels)
        return pixels_from_images(encoder.decode(mean_BCHW.to(generator.device)))[0]

    def _of_files(self, generator: Generator) -> np.ndarray:
        """Return the features of the reference folder's pictures, in the order of their names."""
        features = self._judges.features
        if features is None:
            return np.zeros((0, 0), np.float32)
        side = generator.latent_shape[1] * generator.autoencoder.downsampling
        pieces = [
            self._files[first : first + PICTURES_AT_ONCE]
            for first in range(0, len(self._files), PICTURES_AT_ONCE)
        ]
        done: dict[int, Arrays] = {}
        for number, pictures, filler in in_turns(
            self._world, len(pieces), lambda piece: reference_pictures(pieces[piece], side, side)
        ):
            mine = {} if filler else {number: {"real": features(pictures)}}
            done |= exchanged(self._world, mine)
        return np.concatenate([done[number]["real"] for number in sorted(done)])

    def _compare(self, found: Arrays, real: np.ndarray | None, captions: Sequence[str]) -> dict[str, Any]:
        chosen, network = self._config.evaluate.metrics, self._judges.features
        measured: dict[str, Any] = {}
        if network is not None and real is not None:
            painted = found["painted"]
            _refuse_non_finite(painted, real)
            fewest = min(len(painted), len(real))
            if "kid" in chosen:
                measured["kid"] = kid(painted, real, paired=not self._files)
            if "frechet" in chosen:
                note = "" if has_frechet_interval(fewest, network.width) else _too_few(fewest, network.width)
                measured["frechet"] = {"name": distance_name(network), **frechet(painted, real), "note": note}
            if "precision_recall" in chosen:
                measured["precision_recall"] = precision_recall(painted, real) | {"neighbours": NEIGHBOURS}
        if "clip" in chosen:
            assert self._judges.images is not None
            painted, real_ones, texts = (unit(found[f"clip_{name}"]) for name in ("painted", "real", "text"))
            judge = {"name": self._judges.images.name, "digest": self._judges.images.digest}
            measured["clip"] = judge | clip_alignment(painted, real_ones, texts, captions)
        return measured

    def _memorisation(
        self,
        generator: Generator,
        latents_NCHW: np.ndarray,
        captions: Sequence[str],
        dataset: HeldOut,
        samples: Sequence[LatentSample],
    ) -> dict[str, Any]:
        config, world = self._config, self._world
        _, height, width = generator.latent_shape
        bucket = (height * generator.autoencoder.downsampling, width * generator.autoencoder.downsampling)
        sets = agreed(world, lambda: open_datasets(generator.trained.config.data, self._paths.latents))
        training = TrainingLatents(sets, bucket, config.evaluate.searched)
        moments = [
            sample.arrays["latent"]
            for sample in samples
            if sample.arrays["latent"].shape[1:] == (height, width)
        ]
        validation = (
            flat_means(torch.from_numpy(np.stack(moments)), dataset.sets[0]) if moments else np.zeros((0, 1))
        )
        painted = latents_NCHW.astype(np.float64).reshape(len(latents_NCHW), -1)
        found = memorised(painted, captions, validation, training, world)
        for opened in sets:
            opened.close()
        return found

    def _described(self, generator: Generator, captions: Sequence[str]) -> dict[str, Any]:
        """Return what was painted and what it was compared with."""
        sample, network = self._config.sample, self._judges.features
        facts: dict[str, Any] = {
            "painted": len(captions),
            "captions": len(set(captions)),
            "weights": generator.trained.weights,
            "sample": {
                name: value
                for name, value in sample.model_dump(mode="json").items()
                if name not in ("prompts", "num_prompts", "every", "weights")
            },
        }
        if network is not None:
            kind = "pictures of a folder" if self._files else VALIDATION
            folder = self._config.evaluate.reference
            facts["reference"] = {
                "kind": kind,
                "folder": folder,
                "pictures": len(self._files) or len(captions),
            }
            facts["features"] = {"name": network.name, "digest": network.digest, "width": network.width}
        return facts


def picture_values(measured: dict[str, Any]) -> dict[str, float]:
    """Return what is recorded of `PictureMetrics.measure`: flat names that end in the weights' name."""
    values: dict[str, float | None] = {}
    if "kid" in measured:
        values |= {
            "kid": measured["kid"]["value"],
            "kid_low": measured["kid"]["low"],
            "kid_high": measured["kid"]["high"],
        }
    if "frechet" in measured:
        found, name = measured["frechet"], "fid" if measured["frechet"]["name"] == "FID" else "frechet"
        values |= {name: found["value"], f"{name}_low": found["low"], f"{name}_high": found["high"]}
    values |= {
        name: measured["precision_recall"][name]
        for name in ("precision", "recall")
        if "precision_recall" in measured
    }
    if "clip" in measured:
        for row in ("painted", "ceiling", "floor"):
            end = "" if row == "painted" else f"_{row}"
            values[f"clip_score{end}"] = measured["clip"][row]["score"]["value"]
            values[f"clip_first{end}"] = measured["clip"][row]["first"]
    if measured.get("memorisation", {}).get("painted"):
        values["memorised"] = measured["memorisation"]["painted"]["share"]
    return {f"{name}_{measured['weights']}": value for name, value in values.items() if value is not None}


def _of_each(judge: FeatureNetwork | ClipImages, pictures: list[np.ndarray]) -> np.ndarray:
    """Return the features of pictures that may differ in shape, one at a time if they do."""
    if len({picture.shape for picture in pictures}) == 1:
        return judge(np.stack(pictures))
    return np.concatenate([judge(picture[None]) for picture in pictures])


def _too_few(samples: int, width: int) -> str:
    return (
        f"{samples} pictures are too few for an interval in {width} features (more than both 40 and {width} * 20 / 19 are "
        "needed): the value is biased upwards"
    )


def _refuse_non_finite(*features: np.ndarray) -> None:
    if not all(np.isfinite(part).all() for part in features):
        raise DataError(
            "evaluate.features: the network gave values that are not finite; are its weights whole?"
        )
