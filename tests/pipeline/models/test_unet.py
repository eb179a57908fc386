"""Oracles: diffusers' U-Net in float64 (forward, every gradient, initial weights), published parameter counts,
and anchors made once with diffusers 0.42.1 (names and shapes; a forward pass that needs no random numbers).
"""

import gzip
import json
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.config import UNetConfig
from pipeline.models.unet import UNet, parameter_count, timestep_embedding
from tests.pipeline.models.unets import (
    ANCHORS,
    FORWARD_ANCHOR,
    REFINER,
    SD2,
    SD15,
    SDXL,
    SMALL,
    SMALL_SDXL,
    TINY,
    assert_equal_to_diffusers,
    changed,
    diffusers_unet,
    text_time,
)


@pytest.mark.parametrize("name, config", [("sd15", SD15), ("sd2", SD2), ("sdxl", SDXL), ("tiny", TINY)])
def test_names_and_shapes_are_diffusers(name: str, config: UNetConfig) -> None:
    anchor = json.loads(gzip.decompress((ANCHORS / f"unet_{name}_state_dict_shapes.json.gz").read_bytes()))
    with torch.device("meta"):
        state = UNet(config).state_dict()
    assert {key: list(tensor.shape) for key, tensor in state.items()} == anchor


@pytest.mark.parametrize(
    "config, parameters, tensors",
    [
        (SD15, 859_520_964, 686),
        (SD2, 865_910_724, 686),
        (SDXL, 2_567_463_684, 1680),
        (REFINER, 2_259_526_660, 1220),
        (TINY, 985_444, 208),
    ],
    ids=["sd15", "sd2", "sdxl", "refiner", "tiny"],
)
def test_published_parameter_counts(config: UNetConfig, parameters: int, tensors: int) -> None:
    assert parameter_count(config) == parameters
    with torch.device("meta"):
        assert len(UNet(config).state_dict()) == tensors


def test_forward_anchor() -> None:
    unet = UNet(TINY).double().eval()
    with torch.no_grad():
        for i, (name, parameter) in enumerate(sorted(unet.named_parameters())):
            value = torch.sin(0.37 * torch.arange(parameter.numel(), dtype=torch.float64) + i) * 0.1
            value += 1 if "norm" in name and name.endswith("weight") else 0
            parameter.copy_(value.reshape(parameter.shape))
        latents = torch.sin(0.11 * torch.arange(512, dtype=torch.float64)).reshape(2, 4, 8, 8)
        text = torch.cos(0.07 * torch.arange(320, dtype=torch.float64)).reshape(2, 5, 32)
        output = unet(latents, torch.tensor([3, 500]), text)
    wanted = torch.tensor(FORWARD_ANCHOR["y"], dtype=torch.float64)
    torch.testing.assert_close(output, wanted, rtol=0, atol=1e-9)


def test_timestep_embedding_values() -> None:
    at_1, at_999 = timestep_embedding(torch.tensor([1, 999]), 320)
    assert at_1.dtype == torch.float32 and at_1.shape == (320,)
    assert at_1[[0, 160]].tolist() == pytest.approx([0.5403023, 0.8414710], abs=1e-7)
    wanted = [0.99964982, -0.02646075, 0.99440634, 0.10562206]
    assert at_999[[0, 160, 159, 319]].tolist() == pytest.approx(wanted, abs=1e-7)


@pytest.mark.parametrize("width", [2, 7, 320])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.bfloat16])
def test_timestep_embedding_is_diffusers_bit_for_bit(width: int, dtype: torch.dtype) -> None:
    timesteps = torch.tensor([0.0, 0.5, 17.25, 999.0]).to(dtype)
    wanted = get_timestep_embedding(timesteps, width, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(timestep_embedding(timesteps, width), wanted, rtol=0, atol=0)


@st.composite
def small_configs(draw: st.DrawFn) -> UNetConfig:
    """Any shape of U-Net that the config allows, with widths that 1, 2 and 4 divide."""
    levels = draw(st.integers(1, 3))

    def a_level(values: list[Any]) -> tuple[Any, ...]:
        return tuple(draw(st.sampled_from(values)) for _ in range(levels))

    sdxl = text_time(draw(st.sampled_from([2, 5])), draw(st.integers(1, 8))) if draw(st.booleans()) else {}
    layers = draw(st.integers(1, 2)) if draw(st.booleans()) else a_level([1, 2])
    return UNetConfig(
        sample_size=8,
        in_channels=draw(st.integers(1, 4)),
        out_channels=draw(st.integers(1, 4)),
        down_block_types=a_level(["CrossAttnDownBlock2D", "DownBlock2D"]),
        mid_block_type=draw(st.sampled_from(["UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None])),
        up_block_types=a_level(["CrossAttnUpBlock2D", "UpBlock2D"]),
        block_out_channels=a_level([4, 8, 12]),
        layers_per_block=layers,
        cross_attention_dim=draw(st.integers(1, 9)),
        attention_head_dim=draw(st.sampled_from([1, 4])) if draw(st.booleans()) else a_level([1, 2, 4]),
        use_linear_projection=draw(st.booleans()),
        norm_num_groups=draw(st.sampled_from([1, 2, 4])),
        norm_eps=draw(st.sampled_from([1e-5, 1e-2])),
        **sdxl,
        **draw(depths((layers,) * levels if isinstance(layers, int) else layers)),
    )


@st.composite
def depths(draw: st.DrawFn, layers: tuple[int, ...]) -> dict[str, Any]:
    """One depth for all, one a level, or one a layer with the way up by itself."""

    def a_layer(counts: tuple[int, ...]) -> tuple[Any, ...]:
        return tuple(tuple(draw(st.integers(1, 2)) for _ in range(count)) for count in counts)

    kind = draw(st.sampled_from(["one", "a level", "a layer", "up by itself"]))
    if kind == "one":
        return {"transformer_layers_per_block": draw(st.integers(1, 2))}
    if kind == "a level":
        return {"transformer_layers_per_block": tuple(draw(st.integers(1, 2)) for _ in layers)}
    up = a_layer(tuple(count + 1 for count in reversed(layers)))
    down = a_layer(layers) if kind == "a layer" else tuple(draw(st.integers(1, 2)) for _ in layers)
    return {"transformer_layers_per_block": down, "reverse_transformer_layers_per_block": up}


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(small_configs(), st.tuples(st.integers(2, 9), st.integers(2, 9)), st.integers(0, 99))
def test_forward_and_gradients_equal_diffusers(config: UNetConfig, size: tuple[int, int], seed: int) -> None:
    assert_equal_to_diffusers(config, size, seed)


@pytest.mark.parametrize("size", [(5, 7), (9, 6), (1, 3), (6, 4)])
def test_sides_that_do_not_halve_evenly(size: tuple[int, int]) -> None:
    assert_equal_to_diffusers(SMALL, size)


def test_sdxl_pooled_text_and_sizes_equal_diffusers() -> None:
    assert_equal_to_diffusers(SMALL_SDXL, (8, 8))


def test_the_refiners_five_sizes_equal_diffusers() -> None:
    refiner = changed(SMALL_SDXL, **text_time(sized=6, pooled=10, sizes=5))
    assert_equal_to_diffusers(refiner, (8, 8), sizes=5)


@pytest.mark.parametrize("config", [SMALL, SMALL_SDXL], ids=["conv_projection", "linear_projection_sdxl"])
def test_weights_load_from_and_into_diffusers(config: UNetConfig) -> None:
    reference = diffusers_unet(config)
    ours = UNet(config)
    ours.load_state_dict(reference.state_dict(), strict=True)
    back = diffusers_unet(config)
    back.load_state_dict(ours.state_dict(), strict=True)
    state = back.state_dict()
    assert state.keys() == ours.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in reference.state_dict().items())


@pytest.mark.parametrize("config", [TINY, SMALL_SDXL], ids=["tiny", "sdxl"])
def test_one_seed_gives_the_initial_weights_of_diffusers(config: UNetConfig) -> None:
    torch.manual_seed(7)
    ours = UNet(config).state_dict()
    torch.manual_seed(7)
    reference = diffusers_unet(config).state_dict()
    different = [name for name in reference if not torch.equal(ours[name], reference[name])]
    assert different == []
