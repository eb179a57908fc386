"""Minutes on this machine's cores, from rates that the demo was measured at; GPU-hours, from `ldm plan`.

Every rate stands in one table with what was measured. Work is counted in closed form, so other sizes and widths scale.
"""

from dataclasses import dataclass
from pathlib import Path

from pipeline.config import AutoencoderConfig, ClipConfig, PerceptualConfig, RunConfig
from pipeline.paths import RunPaths
from pipeline.plan.devices import Site, device_named
from pipeline.plan.encoders import Encoder, TextTower
from pipeline.plan.estimate import HOUR_SECONDS, Target, encode_hours, estimate
from pipeline.plan.network import network_cost
from pipeline.plan.published import newest
from pipeline.plan.workload import workload_of


@dataclass(frozen=True)
class Measured:
    """A stage of the demo as it was timed: so many steps of so many samples took so long."""

    steps: int
    batch: int
    seconds: float
    gflops_a_sample: float
    """Forward and backward, by this file's closed forms for the demo's sizes."""

    @property
    def gflops_a_core_second(self) -> float:
        """What one core did."""
        return self.steps * self.batch * self.gflops_a_sample / self.seconds / MEASURED_CORES


MEASURED_CORES = 2
MEASURED_ON = "two cores of an AMD EPYC with AVX-512 BF16, torch 2.13 (configs/demo.yaml, configs/long.yaml)"
MEASURED = {
    # Three convolutions, fp32, two processes of one thread: ldm demo --long.
    "features": Measured(steps=300, batch=64, seconds=32.0, gflops_a_sample=0.2202),
    # f8, widths 16 to 128, 64 px, bf16, two processes of one thread: the same run.
    "autoencoder": Measured(steps=8500, batch=8, seconds=1310.0, gflops_a_sample=1.993),
    # Width 128, 3 + 2 layers, patch 16, 24 tokens, fp32, two processes of one thread: the same run.
    "clip": Measured(steps=800, batch=96, seconds=120.0, gflops_a_sample=0.1293),
    # 15.6 M parameters on 8x8 latents, one process of two threads, bf16 autocast: the log of a whole demo.
    "train": Measured(steps=1600, batch=32, seconds=820.0, gflops_a_sample=1.979),
}
START_SECONDS = 45.0
"""Of the chain that no work explains: seven starts of torch, DeepSpeed's meeting, the export."""
OTHER_SECONDS_A_SAMPLE = 0.012
"""Preparing a picture twice, encoding it, verifying it: 1,911 emoji of 64 px on two cores."""

VISITS = ((120, 0.4), (400, 0.14), (800, 0.06))
"""Loss against visits of a concept, whatever the number of concepts: 64 and 256 emoji at 64 px, batch 16, single seeds."""
COLOURS, SHAPES, RECOGNISED, SATURATED = 60, 120, 400, 800


@dataclass(frozen=True)
class StageCost:
    """What a stage is expected to take."""

    stage: str
    seconds: float
    words: str


def autoencoder_gflops(section: AutoencoderConfig, image_size: int) -> float:
    """Return forward and backward of one picture: the decoder has one block a level more than the encoder."""
    encoder = Encoder(
        section.block_out_channels,
        section.layers_per_block,
        section.latent_channels,
        section.mid_block_attention,
    )
    side = min(section.crop or image_size, image_size)
    both = 2 + 1 / section.layers_per_block
    return 3 * both * encoder.flops(side, side) / 1e9


def trains_features(section: AutoencoderConfig) -> bool:
    """Return whether a feature network is trained before the autoencoder."""
    return section.perceptual.weight > 0 and section.perceptual.network is None


def features_gflops(section: PerceptualConfig, image_size: int) -> float:
    """Return forward and backward of both views of one picture through a network of three strided convolutions."""
    flops, channels = 0, 3
    for level in range(1, 4):
        wider = section.width * 2 ** (level - 1)
        flops += 2 * 16 * channels * wider * (image_size // 2**level) ** 2
        channels = wider
    return 3 * 2 * flops / 1e9


def clip_gflops(section: ClipConfig, image_size: int) -> float:
    """Return forward and backward of one pair."""
    text = TextTower(section.width, section.text_layers, section.vocabulary, section.max_tokens)
    patches = (image_size // section.patch) ** 2
    vision = TextTower(section.width, section.vision_layers, 1, patches + 1)
    embedding = 2 * patches * section.patch**2 * 3 * section.width
    return 3 * (text.flops + vision.flops + embedding) / 1e9


def network_gflops(config: RunConfig) -> float:
    """Return forward and backward of the U-Net for one sample of `config`'s size."""
    assert config.first_stage is not None
    tokens = config.first_stage.clip.max_tokens
    return network_cost(config.model, config.model.sample_size, tokens).training_flops / 1e9


def step_seconds(stage: str, gflops_a_sample: float, batch: int, cores: int) -> float:
    """Return the seconds of a step, in proportion to work and cores."""
    return batch * gflops_a_sample / (MEASURED[stage].gflops_a_core_second * cores)


def stage_costs(config: RunConfig, samples: int, cores: int) -> list[StageCost]:
    """Return what each part of `ldm demo` is expected to take on so many cores."""
    assert config.first_stage is not None
    autoencoder, clip, size = (
        config.first_stage.autoencoder,
        config.first_stage.clip,
        config.encode.image_size,
    )
    perceptual = autoencoder.perceptual
    parts = (
        ("features", perceptual.steps, perceptual.batch, features_gflops(perceptual, size)),
        ("autoencoder", autoencoder.steps, autoencoder.batch, autoencoder_gflops(autoencoder, size)),
        ("clip", clip.steps, clip.batch, clip_gflops(clip, size)),
        ("train", config.train.steps, config.engine.global_batch, network_gflops(config)),
    )
    costs = [
        StageCost(
            stage,
            steps * step_seconds(stage, work, batch, cores),
            f"{steps:,} steps of {batch}, {work:.2f} GFLOP each",
        )
        for stage, steps, batch, work in parts
        if stage != "features" or trains_features(autoencoder)
    ]
    return [*costs, StageCost("all else", other_seconds(samples, size, cores), "reading, encoding, starts")]


def other_seconds(samples: int, image_size: int, cores: int) -> float:
    """Return what preparing, encoding, evaluating, painting and starting take."""
    pixels = (image_size / 64) ** 2
    return START_SECONDS + samples * OTHER_SECONDS_A_SAMPLE * pixels * MEASURED_CORES / cores


def visits_words(visits: float) -> str:
    """Return what a picture looks like after so many visits of its concept, in words."""
    if visits < COLOURS:
        return "colours at best, nothing that is recognised"
    if visits < SHAPES:
        return "the right colours, hardly any shapes"
    if visits < RECOGNISED:
        return "shapes begin, many are recognised"
    return "recognised" if visits < SATURATED else "recognised, about as sharp as the autoencoder"


@dataclass(frozen=True)
class GpuCost:
    """GPU-hours by arithmetic and published speeds: an estimate, measured on no GPU here."""

    device: str
    devices: int
    train_hours: float
    encode_hours: float
    fits: bool
    memory_gib: float


def gpu_cost(config: RunConfig, samples: int, devices: int, device: str = "h100") -> GpuCost:
    """Return device-hours of training and encoding `samples` samples on so many devices."""
    found = device_named(device)
    workload = workload_of(config, RunPaths(Path(config.runs) / config.name), samples)
    plan = estimate(workload, Target(found, newest(found.name), Site()), devices)
    seconds = plan.training_seconds or 0.0
    return GpuCost(
        found.name,
        devices,
        seconds * devices / HOUR_SECONDS,
        encode_hours(workload, found, samples),
        plan.fits,
        plan.memory.gib,
    )
