"""Published and small U-Nets, each beside diffusers' own with the same weights and inputs."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from pipeline.config import UNetConfig
from pipeline.models.unet import UNet

ANCHORS = Path(__file__).parent / "anchors"


def changed(config: UNetConfig, **fields: Any) -> UNetConfig:
    return UNetConfig.model_validate(config.model_dump() | fields)


def text_time(sized: int, pooled: int, sizes: int = 6) -> dict[str, Any]:
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": sized,
        "projection_class_embeddings_input_dim": pooled + sizes * sized,
    }


SD15 = UNetConfig()
SD2 = UNetConfig(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True)
SDXL = UNetConfig(
    sample_size=128,
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    cross_attention_dim=2048,
    use_linear_projection=True,
    **text_time(sized=256, pooled=1280),
)
REFINER = changed(
    SDXL,
    block_out_channels=(384, 768, 1536, 1536),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=4,
    attention_head_dim=(6, 12, 24, 24),
    cross_attention_dim=1280,
    **text_time(sized=256, pooled=1280, sizes=5),
)
FORWARD_ANCHOR = json.loads((ANCHORS / "unet_tiny_forward_anchor.json").read_text())
TINY = UNetConfig.model_validate(
    {field: tuple(v) if isinstance(v, list) else v for field, v in FORWARD_ANCHOR["config"].items()}
)

SMALL = UNetConfig(
    sample_size=8,
    block_out_channels=(8, 16, 16),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    cross_attention_dim=12,
    attention_head_dim=(2, 4, 2),
    transformer_layers_per_block=(1, 1, 2),
    norm_num_groups=4,
)
SMALL_SDXL = changed(SMALL, use_linear_projection=True, **text_time(sized=6, pooled=10))


def diffusers_unet(config: UNetConfig) -> Any:
    """Typed Any: diffusers loads its classes lazily, so type checkers see an empty stand-in."""
    return UNet2DConditionModel(**config.model_dump())


def random_pair(config: UNetConfig, seed: int = 0) -> tuple[UNet, Any]:
    """Ours and diffusers' with the same float64 weights, none at a value (0, 1) that hides a mix-up."""
    generator = torch.Generator().manual_seed(seed)
    ours = UNet(config).double()
    with torch.no_grad():
        for parameter in ours.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise, alpha=0.1)
    reference = diffusers_unet(config).double()
    reference.load_state_dict(ours.state_dict(), strict=True)
    return ours, reference


def random_inputs(
    config: UNetConfig, size: tuple[int, int] = (8, 8), dtype: torch.dtype = torch.float64, sizes: int = 6
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    inputs = {
        "latents_BCHW": normal(2, config.in_channels, *size),
        "timesteps_B": torch.randint(0, 1000, (2,), generator=generator),
        "text_BLD": normal(2, 5, config.cross_attention_dim),
    }
    sized, projected = config.addition_time_embed_dim, config.projection_class_embeddings_input_dim
    if sized is not None and projected is not None:
        inputs["pooled_BP"] = normal(2, projected - sizes * sized)
        inputs["time_ids_BS"] = torch.randint(0, 1024, (2, sizes), generator=generator)
    return inputs


def reference_forward(reference: Any, inputs: dict[str, Tensor]) -> Tensor:
    added = {"text_embeds": inputs.get("pooled_BP"), "time_ids": inputs.get("time_ids_BS")}
    return reference(
        inputs["latents_BCHW"], inputs["timesteps_B"], inputs["text_BLD"], added_cond_kwargs=added
    ).sample


def gradients(output: Tensor, model: torch.nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a fixed uneven sum of the output, by every parameter and every input that can have one."""
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
    wanted = dict(model.named_parameters()) | {k: v for k, v in inputs.items() if v.requires_grad}
    found = torch.autograd.grad((output * weights).sum(), list(wanted.values()))
    return dict(zip(wanted, found, strict=True))


def assert_equal_to_diffusers(
    config: UNetConfig, size: tuple[int, int], seed: int = 0, sizes: int = 6
) -> None:
    ours, reference = random_pair(config, seed)
    inputs = random_inputs(config, size, sizes=sizes)
    output, wanted = ours(**inputs), reference_forward(reference, inputs)
    assert output.shape == (2, config.out_channels, *size)
    torch.testing.assert_close(output, wanted, rtol=1e-9, atol=1e-9)
    actual, expected = gradients(output, ours, inputs), gradients(wanted, reference, inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
