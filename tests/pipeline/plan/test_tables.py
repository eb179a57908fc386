"""Closed forms against the real networks on the meta device: arithmetic and weights to the unit, activations to 0.5 %."""

import pytest
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from pipeline.config import UNetConfig
from pipeline.plan.encoders import Encoder, known
from pipeline.plan.network import network_cost
from pipeline.plan.published import MLPERF_FLOPS, SD2_PARAMETERS
from tests.pipeline.plan.meta import count_unet, flops_of, kept_bytes, unet_config

SIZES = [("sd15", 32, 77), ("sd15", 64, 77), ("sd2", 64, 77), ("sdxl", 128, 77), ("demo", 16, 24)]
ODD = UNetConfig(
    block_out_channels=(32, 64, 64),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    mid_block_type=None,
    layers_per_block=(1, 2, 1),
    transformer_layers_per_block=(1, 2, 1),
    cross_attention_dim=24,
    attention_head_dim=4,
    norm_num_groups=8,
)


@pytest.mark.parametrize(("name", "side", "tokens"), SIZES)
def test_unet_to_the_flop_and_the_parameter(name: str, side: int, tokens: int) -> None:
    _equal(unet_config(name), side, tokens)


def test_unet_of_another_shape_with_sides_that_do_not_halve() -> None:
    _equal(ODD, 13, 5)


def _equal(config: UNetConfig, side: int, tokens: int) -> None:
    counted, worked_out = count_unet(config, side, tokens), network_cost(config, side, tokens)
    assert (worked_out.parameters, worked_out.tensors) == (counted.parameters, counted.tensors)
    assert worked_out.forward_flops == counted.forward_flops
    assert worked_out.backward_flops == counted.backward_flops
    assert worked_out.activation_bytes("bf16") == pytest.approx(
        counted.kept_bytes, rel=0.02 if side < 16 else 0.005
    )
    assert worked_out.largest_block_elements == 0


@pytest.mark.parametrize(("name", "side", "tokens"), [("sd15", 64, 77), ("demo", 16, 24)])
def test_checkpointed_blocks_keep_their_inputs(name: str, side: int, tokens: int) -> None:
    config = unet_config(name)
    worked_out = network_cost(config, side, tokens, checkpointing=True)
    kept = 2 * (worked_out.norm_elements + worked_out.matmul_elements)
    assert kept == pytest.approx(kept_bytes(config, side, tokens, checkpointing=True), rel=0.005)
    assert worked_out.largest_block_elements > 0
    assert worked_out.activation_bytes("bf16") < 0.4 * network_cost(config, side, tokens).activation_bytes(
        "bf16"
    )


def test_the_published_benchmark_is_sd2_at_512_px() -> None:
    cost = network_cost(unet_config("sd2"), 64, 77)
    assert (cost.parameters, cost.training_flops) == (SD2_PARAMETERS, MLPERF_FLOPS)


def test_parameters_that_are_published() -> None:
    """diffusers states SD 1.5's in modeling_utils.py."""
    assert network_cost(unet_config("sd15"), 64, 77).parameters == 859_520_964
    assert network_cost(unet_config("sdxl"), 128, 77).parameters == 2_567_463_684


@pytest.mark.parametrize("name", ["clip_l", "openclip_h", "openclip_big_g"])
def test_text_towers(name: str) -> None:
    tower = known()[0][name]
    config = CLIPTextConfig(
        hidden_size=tower.width,
        intermediate_size=4 * tower.width,
        num_hidden_layers=tower.layers,
        num_attention_heads=tower.width // 64,
        projection_dim=tower.projection or 512,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        model = (CLIPTextModelWithProjection if tower.projection else CLIPTextModel)(config).eval()
        tokens = torch.zeros(1, tower.tokens, dtype=torch.long)
    assert tower.parameters == sum(weight.numel() for weight in model.parameters())
    assert tower.flops == flops_of(lambda: model(tokens))


@pytest.mark.parametrize("pixels", [256, 512])
def test_the_published_autoencoders_encoder(pixels: int) -> None:
    _same_encoder(known()[1], pixels, norm_num_groups=32)


def test_an_autoencoder_of_ones_own() -> None:
    _same_encoder(Encoder((16, 32, 64), 1, 4, mid_block_attention=False), 64, norm_num_groups=8)


def _same_encoder(encoder: Encoder, pixels: int, norm_num_groups: int) -> None:
    levels = len(encoder.block_out_channels)
    with torch.device("meta"):
        model = AutoencoderKL(
            block_out_channels=encoder.block_out_channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=encoder.layers_per_block,
            latent_channels=encoder.latent_channels,
            mid_block_add_attention=encoder.mid_block_attention,
            norm_num_groups=norm_num_groups,
        )
        picture = torch.empty(1, 3, pixels, pixels)
    assert encoder.flops(pixels, pixels) == flops_of(lambda: model.encode(picture))
