"""Keys and values of a text are computed once while it is remembered, and the prediction does not change."""

import pytest
import torch

from pipeline.config import UNetConfig
from pipeline.models.layers import TransformerBlock
from pipeline.models.text_memory import text_remembered
from pipeline.models.unet import UNet

CONFIG = UNetConfig(
    sample_size=8,
    block_out_channels=(16, 32),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    cross_attention_dim=12,
    attention_head_dim=2,
    norm_num_groups=8,
)


@pytest.fixture
def network() -> UNet:
    torch.manual_seed(0)
    return UNet(CONFIG).eval().requires_grad_(False)


def test_projected_once_a_text_and_the_prediction_stays(network: UNet) -> None:
    calls: list[torch.Tensor] = []
    blocks = [block for block in network.modules() if isinstance(block, TransformerBlock)]
    for block in blocks:
        block.attn2.to_k.register_forward_pre_hook(lambda _, inputs: calls.append(inputs[0]))
    z, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 500])
    first, second = torch.randn(2, 5, 12), torch.randn(2, 5, 12)
    plain = [network(z, t, text) for text in (first, second)]
    calls.clear()
    with text_remembered(network):
        for _ in range(3):
            assert torch.equal(network(z, t, first), plain[0])
            assert torch.equal(network(z, t, second), plain[1])
    assert len(calls) == 2 * len(blocks)


def test_nothing_is_remembered_afterwards(network: UNet) -> None:
    z, t, text = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 5, 12)
    with pytest.raises(ZeroDivisionError), text_remembered(network):
        before = network(z, t, text)
        raise ZeroDivisionError
    text += 1.0
    assert not torch.equal(network(z, t, text), before)
