"""How the U-Net runs: dropout, recomputing, bfloat16, channels_last and compiled, always the same function."""

import pytest
import torch
from torch import Tensor

from pipeline.config import UNetConfig
from pipeline.models.layers import ResnetBlock, TransformerBlock
from pipeline.models.unet import UNet
from tests.pipeline.models.unets import (
    SMALL,
    SMALL_SDXL,
    TINY,
    changed,
    gradients,
    random_inputs,
    random_pair,
    reference_forward,
)

ONE_LEVEL = changed(
    SMALL,
    block_out_channels=(8,),
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",),
    attention_head_dim=2,
    transformer_layers_per_block=1,
)
TWO_LEVELS_SDXL = changed(
    SMALL_SDXL,
    block_out_channels=(8, 16),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=2,
    transformer_layers_per_block=1,
)


def test_dropout_sleeps_in_eval_and_sits_where_diffusers_has_it() -> None:
    ours, reference = random_pair(changed(SMALL, dropout=0.5))
    without = UNet(SMALL).double()
    without.load_state_dict(ours.state_dict())
    inputs = random_inputs(SMALL)

    ours.eval()
    assert torch.equal(ours(**inputs), ours(**inputs))
    assert torch.equal(ours(**inputs), without(**inputs))

    ours.train()
    reference.train()
    torch.manual_seed(3)
    first, second = ours(**inputs), ours(**inputs)
    torch.manual_seed(3)
    wanted = reference_forward(reference, inputs)
    assert not torch.allclose(first, second)
    torch.testing.assert_close(first, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_runs_blocks_twice_and_keeps_the_gradients(dropout: float) -> None:
    config = changed(SMALL_SDXL, dropout=dropout)
    unet = UNet(config).double().train()
    inputs = random_inputs(config)
    blocks = [module for module in unet.modules() if isinstance(module, ResnetBlock | TransformerBlock)]
    calls: list[torch.nn.Module] = []
    for block in blocks:
        block.register_forward_pre_hook(lambda module, _: calls.append(module))

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        calls.clear()
        torch.manual_seed(5)
        output = unet(**inputs)
        return output, gradients(output, unet, inputs)

    output, wanted = run()
    assert [calls.count(block) for block in blocks] == [1] * len(blocks)
    unet.enable_gradient_checkpointing()
    checkpointed, actual = run()
    assert [calls.count(block) for block in blocks] == [2] * len(blocks)
    torch.testing.assert_close(checkpointed, output, rtol=0, atol=1e-12)
    torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("config", [TINY, SMALL_SDXL], ids=["tiny", "sdxl"])
def test_bfloat16_is_finite_and_near_float64(config: UNetConfig) -> None:
    torch.manual_seed(0)
    half = UNet(config).bfloat16().eval()
    exact = UNet(config).double().eval()
    exact.load_state_dict(half.state_dict())
    inputs = random_inputs(config, dtype=torch.bfloat16) | {"timesteps_B": torch.tensor([517, 999])}
    with torch.no_grad():
        output = half(**inputs)
        wanted = exact(**{k: v.double() if v.is_floating_point() else v for k, v in inputs.items()})
    assert output.dtype == torch.bfloat16 and bool(output.isfinite().all())
    assert (output.double() - wanted).norm() < 0.03 * wanted.norm()


@pytest.mark.parametrize("config", [SMALL, SMALL_SDXL], ids=["conv_projection", "linear_projection_sdxl"])
def test_channels_last_changes_nothing_but_the_layout(config: UNetConfig) -> None:
    unet, _ = random_pair(config)
    inputs = random_inputs(config, (6, 8))
    output = unet(**inputs)
    wanted = gradients(output, unet, inputs)
    unet.to(memory_format=torch.channels_last)
    latents = inputs["latents_BCHW"].detach().contiguous(memory_format=torch.channels_last)
    last = inputs | {"latents_BCHW": latents.requires_grad_()}
    turned = unet(**last)
    torch.testing.assert_close(turned, output, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(turned, unet, last), wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "config, recompute", [(ONE_LEVEL, False), (TWO_LEVELS_SDXL, True)], ids=["plain", "sdxl_checkpointed"]
)
def test_compiles_as_one_graph(config: UNetConfig, recompute: bool) -> None:
    """`fullgraph` makes a break an error; the backend "eager" runs the captured graph as it is."""
    unet, _ = random_pair(config)
    if recompute:
        unet.enable_gradient_checkpointing()
    inputs = random_inputs(config)
    torch._dynamo.reset()
    output = torch.compile(unet, fullgraph=True, backend="eager")(**inputs)
    torch.testing.assert_close(output, unet(**inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("backend, tolerance", [("aot_eager", 1e-9), ("inductor", 1e-6)])
def test_compiled_forward_and_gradients_are_equal(backend: str, tolerance: float) -> None:
    """Inductor's vectorised cosine differs in the last bit of the timestep embedding, which is float32."""
    unet, _ = random_pair(ONE_LEVEL)
    inputs = random_inputs(ONE_LEVEL)
    torch._dynamo.reset()
    output, wanted = torch.compile(unet, fullgraph=True, backend=backend)(**inputs), unet(**inputs)
    torch.testing.assert_close(output, wanted, rtol=tolerance, atol=tolerance)
    actual, expected = gradients(output, unet, inputs), gradients(wanted, unet, inputs)
    torch.testing.assert_close(actual, expected, rtol=100 * tolerance, atol=100 * tolerance)
