"""A step from disk to updated weights: ours on cached latents against the loop of diffusers' text-to-image example.

    python -m benchmarks.step --at-least 1.48

The U-Net is the demo's on latents of 32 x 32: at its widths a core is about as busy as in the autoencoder, so that
arithmetic and time stand in the same ratio. Autoencoder and text encoder are so small that their arithmetic stands to
the U-Net's as SD 1.5's does at 512 px: 0.464 and 0.0055. Side A reads our tars, samples the posterior, trains with our
engine and averages. Side B does what the body of examples/text_to_image/train_text_to_image.py does: decodes the picture,
encodes it and the caption, gathers the loss, steps torch's default AdamW, steps EMAModel, reads the loss. First both
networks and losses are compared on one batch.
"""

import argparse
import io
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.harness import MARKDOWN_HEADER, Comparison, Rounds, Side, compare, gate, markdown_row
from benchmarks.loaders.samples import SPECS, build
from pipeline.config import DataConfig, EmaConfig, EngineConfig, OptimizerConfig, RunConfig, UNetConfig
from pipeline.config_file import load_config
from pipeline.data.loader import LatentBatch, LatentLoader
from pipeline.latents.manifest import Manifest
from pipeline.latents.reader import LatentDataset
from pipeline.latents.record import npy_bytes
from pipeline.models.unet import UNet
from pipeline.models.unet_folder import diffusers_config
from pipeline.plan.encoders import Encoder, TextTower
from pipeline.plan.network import network_cost
from pipeline.publish import file_digest, whole_file, write_bytes
from pipeline.training.averages.ema import Ema
from pipeline.training.engine import Engine
from pipeline.training.fragments import Fragments
from pipeline.training.learning_rate import learning_rate
from pipeline.training.step import TrainStep
from pipeline.training.stop import Stop
from pipeline.training.text import StoredText
from pipeline.training.world import World, end_world, start_world

REPOSITORY = Path(__file__).resolve().parents[1]
BATCH, SAMPLES, PIXELS, TOKENS = 4, 256, 256, 77
MODEL: UNetConfig = load_config(REPOSITORY / "configs" / "small.yaml").model.model_copy(
    update={"sample_size": PIXELS // 8, "cross_attention_dim": 64}
)
OPTIMIZER = OptimizerConfig()
WANTED = {"autoencoder": 1116.66 / 2406.77, "text encoder": 13.30 / 2406.77}


@dataclass(frozen=True)
class Ratios:
    """Arithmetic of one sample, in FLOP."""

    unet: int
    autoencoder: int
    text_encoder: int

    def __str__(self) -> str:
        return (
            f"U-Net {self.unet / 1e9:.2f} GFLOP a sample, autoencoder {self.autoencoder / self.unet:.3f} of it (512 px: "
            f"{WANTED['autoencoder']:.3f}), text encoder {self.text_encoder / self.unet:.4f} ({WANTED['text encoder']:.4f})"
        )


AUTOENCODER = Encoder((16, 32, 64, 64), 2, 4, mid_block_attention=True)
TOWER = TextTower(width=64, layers=6, vocabulary=1000, tokens=TOKENS)


def ratios() -> Ratios:
    """Return the arithmetic of the three networks."""
    unet = network_cost(MODEL, PIXELS // 8, TOKENS).training_flops
    return Ratios(unet, AUTOENCODER.flops(PIXELS, PIXELS), TOWER.flops)


@contextmanager
def ours(world: World, dataset: Path, config: RunConfig) -> Iterator[tuple[Callable[[], float], TrainStep]]:
    """Give a step of `pipeline.training.train` without its records, and the part of it that makes gradients."""
    torch.manual_seed(0)
    engine = Engine(UNet(MODEL), engine=config.engine, optimizer=OPTIMIZER, world=world, micro_batches=1)
    reader = LatentDataset(dataset)
    loader = LatentLoader(
        reader,
        seed=0,
        engine=config.engine,
        objective=config.objective,
        data=DataConfig(verify="off"),
        rank=0,
        world_size=1,
    )
    with closing(engine), closing(reader), closing(loader.steps(0)) as stream:
        ema, stop = Ema(Fragments(engine, world), EmaConfig()), Stop(world)
        text = StoredText(reader, world.device, pooled=False)
        train_step = TrainStep(config, world, engine, reader.spec, text)

        def step() -> float:
            stop.agreed()
            losses = train_step.accumulate(next(stream), 0)
            if engine.step(learning_rate(OPTIMIZER, 0, 1000)).applied:
                ema.update()
            return float(losses.total) / BATCH

        yield step, train_step


class Example:
    """The loop of diffusers' example, without its argument parsing and its progress bar."""

    def __init__(self, pictures: list[bytes]) -> None:
        self.accelerator = Accelerator(cpu=True)
        torch.manual_seed(0)
        ours = UNet(MODEL)
        unet: Any = UNet2DConditionModel.from_config(diffusers_config(MODEL))
        unet.load_state_dict(ours.state_dict())
        optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4)
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
        self.unet, self.optimizer, self.schedule = self.accelerator.prepare(unet, optimizer, schedule)
        self.ema = EMAModel(unet.parameters(), decay=0.9999)
        self.vae: Any = AutoencoderKL(
            block_out_channels=AUTOENCODER.block_out_channels,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=AUTOENCODER.layers_per_block,
            norm_num_groups=8,
        ).requires_grad_(False)
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=TOWER.vocabulary,
                hidden_size=TOWER.width,
                intermediate_size=4 * TOWER.width,
                num_hidden_layers=TOWER.layers,
                num_attention_heads=1,
                bos_token_id=0,
                eos_token_id=1,
            )
        ).requires_grad_(False)
        self.noise_scheduler: Any = DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
        )
        self.pictures, self._next = pictures, 0

    def batch(self) -> tuple[Tensor, Tensor]:
        """Return pixels [B, 3, H, W] in [-1, 1], decoded now, and token ids."""
        arrays = []
        for _ in range(BATCH):
            with Image.open(io.BytesIO(self.pictures[self._next % len(self.pictures)])) as picture:
                arrays.append(np.asarray(picture.convert("RGB")))
            self._next += 1
        pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1
        return pixels, torch.randint(0, TOWER.vocabulary, (BATCH, TOKENS))

    def loss(self, latents: Tensor, noise: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        """Return the example's loss."""
        noisy = self.noise_scheduler.add_noise(latents, noise, timesteps)
        prediction = self.unet(noisy, timesteps, text, return_dict=False)[0]
        return torch.nn.functional.mse_loss(prediction.float(), noise.float(), reduction="mean")

    def step(self) -> float:
        """Take a step and return what the progress bar would show."""
        pixels, tokens = self.batch()
        latents = self.vae.encode(pixels).latent_dist.sample() * 0.18215
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (BATCH,))
        text = self.text_encoder(tokens, return_dict=False)[0]
        loss = self.loss(latents, noise, timesteps, text)
        mean = self.accelerator.gather(loss.repeat(BATCH)).mean()
        train_loss = mean.item()
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.unet.parameters(), OPTIMIZER.clip_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.ema.step(self.unet.parameters())
        return float(train_loss + 0 * loss.detach().item())


def same_loss(example: Example, train_step: TrainStep, batch: LatentBatch) -> None:
    """Assert that both sides lose the same on the same noisy latents; the gradients that ours leaves are dropped."""
    with torch.no_grad():
        loss_B, _ = train_step._losses(batch)
        mean, logvar = batch.moments.float().chunk(2, dim=1)
        latents = (mean + (0.5 * logvar.clamp(-30, 20)).exp() * batch.posterior_noise) * 0.18215
        text = train_step.text.conditions(batch).text_BLD
        theirs = example.loss(latents, batch.noise, batch.timesteps, text)
    torch.testing.assert_close(loss_B.mean(), theirs, rtol=1e-4, atol=1e-5)


def write_dataset(folder: Path, size: str) -> Path:
    """Write a data set of `SPECS[size]` with its null text and return its folder."""
    dataset = build(folder, size, SAMPLES)
    files = {}
    for member in SPECS[size].text_members(1):
        write_bytes(dataset / "null" / f"{member.name}.npy", npy_bytes(np.zeros(member.shape, member.dtype)))
        files[member.name] = file_digest(dataset / "null" / f"{member.name}.npy")
    replace(Manifest.load(dataset), null=files).save(dataset)
    return dataset


def write_pictures() -> list[bytes]:
    """Return as JPEG files what the example decodes in each step."""
    draw = np.random.default_rng(0)
    pictures = []
    for _ in range(16):
        small = Image.fromarray(draw.integers(0, 255, (32, 32, 3), dtype=np.uint8))
        stream = io.BytesIO()
        small.resize((PIXELS, PIXELS)).save(stream, "JPEG", quality=90)
        pictures.append(stream.getvalue())
    return pictures


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparisons; write CSV, PNG and `step.md`, print the table.

    Raises: SystemExit with code 1 where `--at-least` does not hold at stage 0; AssertionError where the losses differ.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("--rounds", type=int, default=12, help="measured rounds")
    parser.add_argument(
        "--at-least", type=float, help="fail where the example may take less than this times ours"
    )
    parser.add_argument("--out-dir", type=Path, default=REPOSITORY / "benchmarks" / "results")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    world = start_world(0, 1, 0, "127.0.0.1", 0)
    try:
        with tempfile.TemporaryDirectory() as folder:
            dataset, pictures = write_dataset(Path(folder), "step"), write_pictures()
            comparisons = [
                against_example(world, stage, dataset, Example(pictures), options) for stage in (0, 1)
            ]
    finally:
        end_world()
    table = "\n".join([str(ratios()), "", MARKDOWN_HEADER, *map(markdown_row, comparisons)])
    with whole_file(options.out_dir / "step.md") as beside:
        beside.write_text(table + "\n")
    print(table)
    if options.at_least is not None:
        gate(comparisons[0], at_least=options.at_least)
    return 0


def against_example(
    world: World, stage: int, dataset: Path, example: Example, options: argparse.Namespace
) -> Comparison:
    """Return the comparison with ours at a ZeRO stage: 0 holds what the example holds, 1 is the shipped configs'."""
    base = load_config(REPOSITORY / "configs" / "sd15-512.yaml", ())
    engine = EngineConfig(
        global_batch=BATCH,
        micro_batch=BATCH,
        precision="fp32",
        zero_stage=stage,  # type: ignore[arg-type]
    )
    config = base.model_copy(update={"model": MODEL, "engine": engine, "optimizer": OPTIMIZER})
    with ours(world, dataset, config) as (step, train_step):
        with closing(LatentDataset(dataset)) as reader, closing(_batches(reader, config)) as batches:
            same_loss(example, train_step, next(batches))
        return compare(
            Side(f"ours, cached latents, ZeRO-{stage}", step),
            Side("diffusers' example", example.step),
            name="step_from_disk" if stage == 0 else f"step_from_disk_zero_{stage}",
            out_dir=options.out_dir,
            check=lambda mine, theirs: np.isfinite([mine, theirs]).all(),
            rounds=Rounds(measured=options.rounds, warmup=2),
        )


def _batches(reader: LatentDataset, config: RunConfig) -> Generator[LatentBatch, None, None]:
    loader = LatentLoader(
        reader,
        seed=0,
        engine=config.engine,
        objective=config.objective,
        data=DataConfig(verify="off"),
        rank=0,
        world_size=1,
    )
    with closing(loader.steps(0)) as stream:
        for micro_batches in stream:
            yield micro_batches[0]


if __name__ == "__main__":
    sys.exit(main())
