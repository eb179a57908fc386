"""Maps of attention: the probabilities that the fused kernel uses, in the picture's own layout, of the prompt alone."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it

from pipeline.config import UNetConfig
from pipeline.models.attention_maps import attention_recorded
from pipeline.models.layers import Attention
from pipeline.models.text_memory import text_remembered
from pipeline.models.unet import UNet

CONFIG = UNetConfig(
    sample_size=8,
    block_out_channels=(16, 32),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    mid_block_type=None,
    layers_per_block=1,
    cross_attention_dim=12,
    attention_head_dim=2,
    norm_num_groups=8,
)


@pytest.fixture
def network() -> UNet:
    torch.manual_seed(0)
    return UNet(CONFIG).eval().requires_grad_(False)


def test_one_layer_has_the_kernel_s_own_probabilities(monkeypatch: pytest.MonkeyPatch, network: UNet) -> None:
    """The kernel's product with an identity for V is its probabilities: at the latents' size nothing is resized."""
    found: list[torch.Tensor] = []
    forward = Attention.forward

    def watched(layer: Attention, latent: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        if context.shape[-1] == 12:
            query, key = (
                part.unflatten(-1, (layer.heads, -1)).transpose(1, 2)
                for part in (layer.to_q(latent), layer.to_k(context))
            )
            one = torch.eye(context.shape[1]).expand(len(context), layer.heads, -1, -1)
            found.append(F.scaled_dot_product_attention(query, key, one).mean(dim=1))
        return forward(layer, latent, context)

    monkeypatch.setattr(Attention, "forward", watched)
    z, t, text = torch.randn(2, 4, 8, 6), torch.tensor([3, 500]), 4 * torch.randn(2, 5, 12)
    with attention_recorded(network, 2, (8, 6)) as maps:
        network(z, t, text)
    expected = torch.stack(found).mean(dim=0).transpose(1, 2).unflatten(-1, (8, 6))
    assert len(found) == 3, "one layer on the way down, two on the way up"
    torch.testing.assert_close(maps.mean(), expected)
    torch.testing.assert_close(maps.mean().sum(dim=1), torch.ones(2, 8, 6))
    assert float(expected.std()) > 0.01, "the layers do not look everywhere alike"


def test_under_guidance_the_prompts_count_and_not_what_is_led_away_from(network: UNet) -> None:
    z, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 500])
    away, towards = 4 * torch.randn(2, 5, 12), 4 * torch.randn(2, 5, 12)
    with attention_recorded(network, 2, (8, 8)) as alone:
        network(z, t, towards)
    with attention_recorded(network, 2, (8, 8)) as guided, text_remembered(network):
        network(z, t, torch.cat([away, towards]))
    torch.testing.assert_close(guided.mean(), alone.mean())


def test_the_prediction_stays_and_nothing_is_recorded_afterwards(network: UNet) -> None:
    z, t, text = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 5, 12)
    plain = network(z, t, text)
    with attention_recorded(network, 1, (4, 4)) as maps:
        assert torch.equal(network(z, t, text), plain)
    before = maps.mean()
    assert before.shape == (1, 5, 4, 4)
    network(z, t, 2 * text)
    assert torch.equal(maps.mean(), before)
