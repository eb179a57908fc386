"""The same minutes of diffusers' own training loop on a run's pictures, judged as the run is.

    python -m benchmarks.peer_loop runs/demo                # as long as the run's own stage `train` took
    python -m benchmarks.peer_loop runs/demo --minutes 10

What the body of diffusers' examples/text_to_image/train_text_to_image.py does, with all that it can be told set as the
run has it: the U-Net's sizes, objective and schedule, batch, learning rate with warm-up and cosine, bf16 by accelerate,
EMAModel, two processes. What it does otherwise it does here too: the autoencoder and the text encoder run in every step, the
loss is gathered, no caption is dropped. The steps that fit into the minutes are measured first and not counted.
Writes RUN/peer/unet.safetensors and RUN/peer.json: first place among 64 by a network that took no part (`picture`).
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTextModel

from benchmarks.judge.features import EfficientNetLite0
from benchmarks.judge.scores import rank_score
from benchmarks.picture import CONCEPTS, spread, trained_pairs
from pipeline.config import RunConfig
from pipeline.config_file import load_config
from pipeline.diffusion.samplers import PREDICTION_TYPES
from pipeline.generate import Generator
from pipeline.models.pixels import images_from_pixels
from pipeline.models.text_encoder import FrozenTextEncoder
from pipeline.models.unet_folder import diffusers_config
from pipeline.paths import RunPaths
from pipeline.publish import whole_file, write_json
from pipeline.trained_network import TrainedNetwork

PRICED_STEPS, WARM_STEPS = 20, 5
BETAS = {"cosine": "squaredcos_cap_v2"}


class Loop:
    """The example's loop on one rank."""

    def __init__(self, config: RunConfig, paths: RunPaths, steps: int) -> None:
        """Prepare everything for `steps` steps, on pictures in memory and tokens made beforehand."""
        objective, optimizer = config.objective, config.optimizer
        self.accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        self.generator = torch.Generator().manual_seed(config.seed + self.accelerator.process_index)
        torch.manual_seed(config.seed)
        unet: Any = UNet2DConditionModel.from_config(diffusers_config(config.model))
        adamw = torch.optim.AdamW(
            unet.parameters(), lr=optimizer.learning_rate, weight_decay=optimizer.weight_decay
        )
        processes = self.accelerator.num_processes
        # accelerate steps the schedule once a process: the example multiplies both numbers too.
        schedule = get_scheduler(
            "cosine",
            adamw,
            num_warmup_steps=min(optimizer.warmup_steps, steps) * processes,
            num_training_steps=steps * processes,
        )
        self.unet, self.optimizer, self.schedule = self.accelerator.prepare(unet, adamw, schedule)
        self.ema = EMAModel(unet.parameters(), decay=config.ema.decay)
        self.vae: Any = AutoencoderKL.from_pretrained(paths.autoencoder).requires_grad_(False)
        self.text_encoder = CLIPTextModel.from_pretrained(paths.text_encoder).requires_grad_(False)
        self.noise_scheduler: Any = DDPMScheduler(
            num_train_timesteps=objective.timesteps,
            beta_schedule=BETAS.get(objective.schedule, objective.schedule),
            beta_start=objective.beta_start,
            beta_end=objective.beta_end,
            prediction_type=PREDICTION_TYPES[objective.prediction],
            clip_sample=False,
        )
        pairs = trained_pairs(config)
        words = FrozenTextEncoder.load(paths.text_encoder)
        self.images, self.tokens = images_from_pixels(pairs.pictures_NHWC), words.tokenize(pairs.captions)[0]
        self.batch = config.engine.global_batch // processes
        self.most_norm = optimizer.clip_grad_norm

    def step(self) -> float:
        """Take one step as the example does; return the gathered loss."""
        chosen = torch.randint(0, len(self.images), (self.batch,), generator=self.generator)
        latents = self.vae.encode(self.images[chosen]).latent_dist.sample() * self.vae.config.scaling_factor
        noise = torch.randn(latents.shape, generator=self.generator)
        timesteps = torch.randint(
            0, self.noise_scheduler.config.num_train_timesteps, (self.batch,), generator=self.generator
        )
        noisy = self.noise_scheduler.add_noise(latents, noise, timesteps)
        text = self.text_encoder(self.tokens[chosen], return_dict=False)[0]
        prediction = self.unet(noisy, timesteps, text, return_dict=False)[0]
        loss = functional.mse_loss(prediction.float(), self._target(latents, noise, timesteps).float())
        mean: float = self.accelerator.gather(loss.repeat(self.batch)).mean().item()
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.unet.parameters(), self.most_norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.ema.step(self.unet.parameters())
        return mean

    def _target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        if self.noise_scheduler.config.prediction_type == "v_prediction":
            velocity: Tensor = self.noise_scheduler.get_velocity(latents, noise, timesteps)
            return velocity
        return noise

    def averaged(self) -> dict[str, Tensor]:
        """Return the averaged weights under the U-Net's own names."""
        self.ema.copy_to(self.unet.parameters())
        network = self.accelerator.unwrap_model(self.unet)
        return {name: tensor.detach().contiguous() for name, tensor in network.state_dict().items()}


def train(run: Path, seconds: float) -> None:
    """Train on this rank for as many steps as fit into `seconds`; rank 0 writes the average."""
    torch.set_num_threads(1)
    paths = RunPaths(run)
    config = load_config(paths.config)
    priced = Loop(config, paths, PRICED_STEPS + WARM_STEPS)
    fitting = torch.tensor([max(1, int(seconds / _step_seconds(priced.step)))])
    steps = int(priced.accelerator.gather(fitting)[0])
    loop = Loop(config, paths, steps)
    started, losses = time.monotonic(), []
    for number in range(steps):
        losses.append(loop.step())
        if loop.accelerator.is_main_process and number % 100 == 99:
            print(f"step {number + 1} of {steps}, loss {sum(losses[-100:]) / 100:.4f}", file=sys.stderr)
    if loop.accelerator.is_main_process:
        took_seconds = time.monotonic() - started
        with whole_file(run / "peer" / "unet.safetensors") as beside:
            save_file(loop.averaged(), beside)
        write_json(
            run / "peer" / "training.json", {"steps": steps, "seconds": took_seconds, "loss": losses[-1]}
        )


def _step_seconds(step: Callable[[], object]) -> float:
    for _ in range(WARM_STEPS):
        step()
    started = time.monotonic()
    for _ in range(PRICED_STEPS):
        step()
    return (time.monotonic() - started) / PRICED_STEPS


def judge(run: Path) -> dict[str, Any]:
    """Paint with the peer's weights and the run's sampler, with and without guidance; score as `picture` does."""
    paths = RunPaths(run)
    trained = TrainedNetwork.newest(paths, "raw", "cpu")
    config = trained.config
    trained.network.load_state_dict(load_file(run / "peer" / "unet.safetensors"))
    generator = Generator.of_run(replace(trained, weights="peer"), paths, "cpu")
    real = trained_pairs(config)
    places = spread(real, CONCEPTS)
    network, own = EfficientNetLite0(), torch.arange(len(places))
    answers = network(real.pictures_NHWC[places.numpy()])
    record: dict[str, Any] = json.loads((run / "peer" / "training.json").read_text())
    for scale in dict.fromkeys((1.0, config.sample.guidance_scale)):
        sample = config.sample.model_copy(update={"guidance_scale": scale})
        captions = [real.captions[place] for place in places]
        painted = generator.paint(captions, seed=sample.seed, sample=sample)
        score = rank_score(network(painted), answers, own)
        record[f"network, guidance {scale:g}"] = asdict(score)
        print(f"guidance {scale:g}: {score}")
    write_json(run / "peer.json", record)
    return record


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a run of `ldm demo`")
    parser.add_argument("--minutes", type=float, help="of training; default the run's own")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    found = parser.parse_args(arguments)
    done = json.loads((found.run / "demo.json").read_text())["stages"]
    seconds = 60.0 * found.minutes if found.minutes else float(done["train"]["seconds"])
    if found.rank:
        train(found.run, seconds)
        return 0
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "bf16", "--dynamo_backend", "no"]
    words = ["--module", "benchmarks.peer_loop", str(found.run), "--rank", "--minutes", str(seconds / 60)]
    subprocess.run([*launch, *words], check=True)
    record = judge(found.run)
    print(f"{record['steps']} steps in {record['seconds']:.0f} s, last loss {record['loss']:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
