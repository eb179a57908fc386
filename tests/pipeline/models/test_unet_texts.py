"""Several texts for each latent, as guidance has them: the numbers of repeated latents, and less arithmetic."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import UNetConfig
from pipeline.models.layers import GEGLU, Pointwise
from pipeline.models.unet import UNet
from tests.pipeline.models.unets import SD2, SMALL, SMALL_SDXL, TINY, changed, random_inputs

TEXT_BELOW = changed(
    SMALL,
    block_out_channels=(8, 16),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=2,
    transformer_layers_per_block=1,
)
TEXT_ONLY_ON_THE_WAY_UP = changed(
    SMALL,
    block_out_channels=(8, 16),
    down_block_types=("DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    mid_block_type=None,
    attention_head_dim=2,
    transformer_layers_per_block=1,
)


def texts_apart(config: UNetConfig, times: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return inputs of two latents with `times` as many texts, and the same with the latents repeated."""
    inputs = random_inputs(config)
    first = {name: tensor[:2].detach() for name, tensor in inputs.items()}
    several = dict(first)
    for name in ("text_BLD", "pooled_BP", "time_ids_BS"):
        if name in several:
            several[name] = torch.cat([several[name] * (1 + turn) for turn in range(times)])
    repeated = dict(several)
    for name in ("latents_BCHW", "timesteps_B"):
        repeated[name] = torch.cat([first[name]] * times)
    return several, repeated


@pytest.mark.parametrize("times", [2, 3])
@pytest.mark.parametrize(
    "config", [TINY, SMALL, SMALL_SDXL, TEXT_BELOW, TEXT_ONLY_ON_THE_WAY_UP], ids=lambda config: None
)
def test_texts_of_a_latent_give_what_repeated_latents_give(config: UNetConfig, times: int) -> None:
    torch.manual_seed(0)
    network = UNet(config).double().eval()
    several, repeated = texts_apart(config, times)
    actual, wanted = network(**several), network(**repeated)
    assert actual.shape[0] == times * 2
    assert not torch.allclose(actual[:2], actual[2:4]), "the texts make a difference"
    torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)


def test_what_precedes_the_first_text_is_computed_once() -> None:
    with torch.device("meta"):
        network = UNet(SD2).requires_grad_(False)

    def flops(latents: int) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(
                torch.empty(latents, 4, 64, 64, device="meta"),
                torch.empty(latents, device="meta"),
                torch.empty(2, 77, SD2.cross_attention_dim, device="meta"),
            )
        return counter.get_total_flops()

    # Once instead of twice: conv_in, the first residual block, the first transformer's projection in and attention
    # to itself, and all that is made of the timestep.
    n, c, residual_blocks_width = 64 * 64, 320, 2 * 320 + 2 * 640 + 6 * 1280 + 6 * 1280 + 3 * 640 + 3 * 320
    convolutions = n * c * 9 * (4 + 2 * c)
    attention = 5 * n * c * c + 2 * n * n * c
    time = c * 4 * c + 4 * c * 4 * c + 4 * c * residual_blocks_width
    assert flops(2) - flops(1) == 2 * (convolutions + attention + time)


@pytest.mark.parametrize("layer", [GEGLU(6, 10), Pointwise(6, 10, 1)], ids=["geglu", "pointwise"])
def test_layers_are_the_same_function_with_and_without_gradients(layer: torch.nn.Module) -> None:
    x = torch.randn(2, 3, 5, 6) if isinstance(layer, GEGLU) else torch.randn(2, 6, 3, 5)
    kept = x.clone()
    wanted = layer(x)
    with torch.no_grad():
        actual = layer(x)
    assert wanted.requires_grad and torch.equal(x, kept)
    torch.testing.assert_close(actual, wanted.detach(), rtol=1e-6, atol=1e-6)
    if isinstance(layer, Pointwise):
        torch.testing.assert_close(wanted, torch.nn.functional.conv2d(x, layer.weight, layer.bias))


def test_a_number_of_texts_that_the_latents_do_not_divide_is_refused() -> None:
    inputs = random_inputs(TINY) | {"text_BLD": torch.randn(5, 7, TINY.cross_attention_dim)}
    with pytest.raises(ValueError, match="text_BLD is"):
        UNet(TINY).double()(**inputs)
