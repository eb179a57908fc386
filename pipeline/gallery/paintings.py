"""Sheets that a trained network paints: other weights, other guidance, the way from noise, and where it looks.

Shape letters: B pictures, C latent channels, H W latent sides, L text tokens.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.config import SampleConfig
from pipeline.config.outcome import SamplerKind
from pipeline.diffusion.objective import x0_from_prediction
from pipeline.diffusion.schedule import Schedule
from pipeline.gallery.learning import spread
from pipeline.gallery.sheet import Sheet, Strip, Tile
from pipeline.generate import Generator
from pipeline.models.attention_maps import attention_recorded
from pipeline.models.pixels import pixels_from_images

SCALES = (1.0, 2.0, 3.0, 5.0, 8.0, 12.0)
X0_TIMES = 8
MOST_WORDS = 10
DARKEST = 0.15
"""Of a picture's brightness where a word's share is lowest."""


def weights_sheet(generators: Iterable[Generator], prompts: Sequence[str], sample: SampleConfig) -> Sheet:
    """Return each prompt painted from the same noise by each generator, under the name of its weights."""
    columns = []
    for generator in generators:
        columns.append((generator.trained.weights, generator.paint(prompts, seed=sample.seed, sample=sample)))
    about = "The same prompt, noise and settings under each kind of weights of this checkpoint."
    return Sheet("weights", "Weights", about, _by_column(prompts, columns))


def guidance_sheet(
    generator: Generator, prompts: Sequence[str], sample: SampleConfig, scales: Sequence[float] = SCALES
) -> Sheet:
    """Return each prompt painted from the same noise at each guidance scale."""
    columns = []
    for scale in scales:
        at_scale = sample.model_copy(update={"guidance_scale": scale})
        columns.append((f"scale {scale:g}", generator.paint(prompts, seed=sample.seed, sample=at_scale)))
    about = "The same prompt and noise at each guidance scale; 1 is the conditional prediction alone."
    return Sheet("guidance", "Guidance", about, _by_column(prompts, columns))


def x0_sheet(generator: Generator, prompts: Sequence[str], sample: SampleConfig) -> Sheet:
    """Return the clean picture that the guided prediction implies, at eight of the times from noise to picture.

    Painted with DDIM (a flow: with Euler's method), whose times are those of the schedule.
    """
    objective = generator.trained.config.objective
    kind: SamplerKind = "flow_euler" if objective.prediction == "flow" else "ddim"
    sample = sample.model_copy(update={"sampler": kind, "steps": max(sample.steps, X0_TIMES)})
    seen: list[tuple[float, Tensor]] = []

    def watch(time: float, z_BCHW: Tensor, predicted_BCHW: Tensor) -> None:
        alpha, sigma = Schedule.from_config(objective).at(time)
        ones_B = torch.ones(len(z_BCHW), device=z_BCHW.device)
        x0_BCHW = x0_from_prediction(
            objective.prediction, predicted_BCHW, z_BCHW, alpha * ones_B, sigma * ones_B
        )
        seen.append((time, x0_BCHW))

    numbers = range(len(prompts))
    generator.images(
        prompts,
        generator.noise(numbers, sample.seed),
        sample,
        generator.generators(numbers, sample.seed),
        watch,
    )
    columns = [
        (f"t {time:.0f}", pixels_from_images(generator.decoded(x0_BCHW)))
        for time, x0_BCHW in spread(seen, X0_TIMES)
    ]
    about = (
        f"What the guided network takes the clean picture to be, at {X0_TIMES} times on the way from noise (t "
        f"{objective.timesteps}) to picture; {kind}, {sample.steps} steps."
    )
    return Sheet("x0", "From noise to picture", about, _by_column(prompts, columns))


def attention_sheet(generator: Generator, prompts: Sequence[str], sample: SampleConfig) -> Sheet:
    """Return each prompt's picture, and where in it the network looked at each of its first ten words.

    One prompt is painted at a time. At scale 0, where the prompt is not read at all, scale 1 is taken.
    """
    sample = sample.model_copy(update={"guidance_scale": sample.guidance_scale or 1.0})
    strips = []
    for number, prompt in enumerate(prompts):
        network = generator.trained.network
        with attention_recorded(network, 1, generator.latent_shape[1:]) as maps:
            painted_HWC = generator.paint([prompt], seed=sample.seed, sample=sample, first_picture=number)[0]
        maps_LHW = maps.mean()[0].cpu()
        words = [word for word in generator.text_encoder.words(prompt) if word.positions][:MOST_WORDS]
        tiles = [_word_tile(painted_HWC, word.text, maps_LHW[word.positions].sum(dim=0)) for word in words]
        strips.append(Strip(prompt, [Tile(painted_HWC, "picture"), *tiles]))
    about = (
        "Bright is where a word's share of the cross-attention is highest (mean over heads, layers and steps); the number is "
        "that share over the word's mean: x 1.0 looks everywhere alike."
    )
    return Sheet("attention", "Where it looks", about, strips)


def _word_tile(picture_HWC: np.ndarray, word: str, map_HW: Tensor) -> Tile:
    """Return the picture under the light of one word's map."""
    height, width, _ = picture_HWC.shape
    low, high = map_HW.min(), map_HW.max()
    light = torch.nn.functional.interpolate(
        ((map_HW - low) / (high - low).clamp(min=1e-12))[None, None], (height, width), mode="bilinear"
    )[0, 0].numpy()
    lit = picture_HWC * (DARKEST + (1.0 - DARKEST) * light[..., None])
    return Tile(lit.round().astype(np.uint8), f"{word} x {float(high / map_HW.mean()):.1f}")


def _by_column(prompts: Sequence[str], columns: Sequence[tuple[str, np.ndarray]]) -> list[Strip]:
    return [
        Strip(prompt, [Tile(pictures[row], label) for label, pictures in columns])
        for row, prompt in enumerate(prompts)
    ]
