"""Sampler iterations per second under guidance: `Generator.denoise` against diffusers' StableDiffusionPipeline.

    python -m benchmarks.sampling                  # the demo's U-Net and one of 37 M parameters
    python -m benchmarks.sampling --size sd        # SD 1.x's 860 M parameters at 32 x 32 latents: minutes

Both sides have the same weights, text states, noise and scheduler, and their latents are compared first. The pipeline is
called as its users call it, with its progress bar off and text states handed in, so that neither side encodes text.
"""

import argparse
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from benchmarks.harness import MARKDOWN_HEADER, Comparison, Rounds, Side, compare, gate, markdown_row
from pipeline.config import ObjectiveConfig, SampleConfig, UNetConfig
from pipeline.config_file import load_config
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.guidance import GuidedNetwork
from pipeline.diffusion.samplers import make_sampler
from pipeline.generate import PICTURES_AT_ONCE, paint_latents
from pipeline.models.text_memory import text_remembered
from pipeline.models.unet import UNet
from pipeline.publish import whole_file

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Size:
    """What is painted: U-Net, latents [pictures, 4, side, side], text [pictures, tokens, width], steps."""

    unet: UNetConfig
    pictures: int
    side: int
    tokens: int
    steps: int
    rounds: int
    at_least: float


def _shipped(name: str) -> UNetConfig:
    return load_config(REPOSITORY / "configs" / f"{name}.yaml").model


def _middle() -> UNetConfig:
    return UNetConfig(
        block_out_channels=(192, 384),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
    )


SIZES = {
    "demo": Size(_shipped("demo"), PICTURES_AT_ONCE, side=8, tokens=24, steps=10, rounds=16, at_least=1.1),
    "small": Size(_shipped("small"), pictures=4, side=16, tokens=24, steps=10, rounds=20, at_least=1.1),
    "middle": Size(_middle(), pictures=2, side=32, tokens=77, steps=5, rounds=10, at_least=0.98),
    "sd": Size(UNetConfig(), pictures=1, side=32, tokens=77, steps=2, rounds=6, at_least=0.98),
}


def compare_size(name: str, out_dir: Path) -> Comparison:
    """Return the comparison of ours (B) against the pipeline (A) at one size: the ratio is ours over theirs in time."""
    size, objective = SIZES[name], ObjectiveConfig()
    sample = SampleConfig(sampler="ddim", steps=size.steps, guidance_scale=5.0)
    torch.manual_seed(0)
    ours = UNet(size.unet).eval().requires_grad_(False)
    theirs: Any = UNet2DConditionModel(**size.unet.model_dump())
    theirs.load_state_dict(ours.state_dict())
    stock = _pipeline(theirs.eval().requires_grad_(False), make_sampler("ddim", objective))
    shape = (size.pictures, size.tokens, size.unet.cross_attention_dim)
    text_BLD, null_BLD = torch.randn(shape), torch.randn(1, *shape[1:]).expand(shape)
    noise_BCHW = torch.randn(size.pictures, size.unet.in_channels, size.side, size.side)

    def by_pipeline() -> Tensor:
        latents: Tensor = stock(
            prompt_embeds=text_BLD,
            negative_prompt_embeds=null_BLD,
            latents=noise_BCHW,
            height=8 * size.side,
            width=8 * size.side,
            num_inference_steps=sample.steps,
            guidance_scale=sample.guidance_scale,
            output_type="latent",
        ).images
        return latents

    def by_us() -> Tensor:
        network = GuidedNetwork(ours, Conditioning(text_BLD), Conditioning(null_BLD), sample)
        with text_remembered(ours):
            return paint_latents(network, noise_BCHW, objective, sample)

    def equal(theirs_BCHW: Tensor, ours_BCHW: Tensor) -> None:
        torch.testing.assert_close(ours_BCHW, theirs_BCHW, rtol=1e-3, atol=1e-3)

    return compare(
        Side("StableDiffusionPipeline", by_pipeline),
        Side("ours", by_us),
        name=f"sampling_{name}",
        out_dir=out_dir,
        check=equal,
        rounds=Rounds(measured=size.rounds, warmup=1),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Compare the sizes asked for, write CSV, PNG and `sampling.md`, and gate the ratio of speeds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampling", description=__doc__)
    parser.add_argument("--size", choices=SIZES, action="append", help="default: demo and middle")
    parser.add_argument("--out-dir", type=Path, default=REPOSITORY / "benchmarks" / "results")
    parser.add_argument("--no-gate", action="store_true", help="print the ratios only")
    options = parser.parse_args(argv)
    names = options.size or ["demo", "middle"]
    comparisons = [compare_size(name, options.out_dir) for name in names]
    table = "\n".join([MARKDOWN_HEADER, *map(markdown_row, comparisons)])
    with whole_file(options.out_dir / "sampling.md") as beside:
        beside.write_text(table + "\n")
    print(table)
    for name, comparison in zip(names, comparisons, strict=True):
        if not options.no_gate:
            gate(comparison, at_most=1.0 / SIZES[name].at_least)
    return 0


def _pipeline(unet: Any, scheduler: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = StableDiffusionPipeline(
            vae=None,
            text_encoder=None,
            tokenizer=None,
            unet=unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


if __name__ == "__main__":
    sys.exit(main())
