"""Oracles: diffusers' U-Net in float64 (forward, every gradient, initial weights), published parameter counts,
and anchors made once with diffusers 0.42.1 (names and shapes; a forward pass that needs no random numbers).
"""

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import UNetConfig
from pipeline.models.layers import ResnetBlock, TransformerBlock
from pipeline.models.unet import UNet, parameter_count, timestep_embedding

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


@pytest.mark.parametrize(
    "config, name, shape, allowed",
    [
        (SMALL, "latents_BCHW", (2, 3, 8, 8), "[2, 4, None, None]"),
        (SMALL, "timesteps_B", (1,), "[2]"),
        (SMALL, "timesteps_B", (), "[2]"),
        (SMALL, "text_BLD", (1, 5, 12), "[2, None, 12]"),
        (SMALL, "text_BLD", (2, 5, 11), "[2, None, 12]"),
        (SMALL, "pooled_BP", (2, 10), "None"),
        (SMALL, "time_ids_BS", (2, 6), "None"),
        (SMALL_SDXL, "pooled_BP", None, "[2, 10]"),
        (SMALL_SDXL, "pooled_BP", (2, 9), "[2, 10]"),
        (SMALL_SDXL, "time_ids_BS", None, "[2, None]"),
    ],
)
def test_inputs_that_would_broadcast_or_be_ignored_are_refused(
    config: UNetConfig, name: str, shape: tuple[int, ...] | None, allowed: str
) -> None:
    inputs: dict[str, Any] = random_inputs(config, dtype=torch.float32)
    inputs[name] = None if shape is None else torch.zeros(shape)
    got = "None" if shape is None else str(list(shape))
    with pytest.raises(ValueError, match=re.escape(f"{name} is {got}, must be {allowed}")):
        UNet(config)(**inputs)


def test_sizes_and_pooled_text_must_fill_the_embedding_together() -> None:
    inputs = random_inputs(SMALL_SDXL, dtype=torch.float32) | {"time_ids_BS": torch.zeros(2, 5)}
    with pytest.raises(ValueError, match=re.escape("pooled_BP is [2, 10], must be [2, 16]")):
        UNet(SMALL_SDXL)(**inputs)


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"attention_head_dim": 3}, r"attention_head_dim 3 \(heads\) does not divide"),
        ({"layers_per_block": (1, 1)}, r"layers_per_block has 2 entries, block_out_channels has 3"),
        ({"transformer_layers_per_block": (1, (1,), 1)}, r"give those of the way up as reverse_transformer"),
        (
            {
                "transformer_layers_per_block": (1, (1, 2), 1),
                "reverse_transformer_layers_per_block": (1, 1, 1),
            },
            r"level 1 has 1 layers on the way down, its depths are \[1, 2\]",
        ),
        (
            {"reverse_transformer_layers_per_block": ((1, 1), (1, 1), (1, 1, 1))},
            r"level 0 has 2 layers on the way up, its depths are \[1, 1, 1\]",
        ),
        ({"norm_num_groups": 3}, r"block_out_channels 8 is not a multiple of norm_num_groups 3"),
        ({"addition_embed_type": "text_time"}, r"go together"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        changed(SMALL, **fields)


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


class CountDispatches(TorchDispatchMode):
    """Counts every aten operator that runs."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def dispatches(work: Callable[[], Tensor]) -> tuple[int, int]:
    """Return the operators of forward, and of forward and backward."""
    with CountDispatches() as forward:
        output = work()
    with CountDispatches() as backward:
        output.sum().backward()
    return forward.calls, forward.calls + backward.calls


def on_meta(config: UNetConfig, side: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    inputs = random_inputs(config, (side, side), dtype=dtype, sizes=5 if config is REFINER else 6)
    text = torch.zeros(1, 77, config.cross_attention_dim)
    one = {name: tensor[:1].detach() for name, tensor in inputs.items()} | {"text_BLD": text}
    return {name: tensor.to("meta") for name, tensor in one.items()}


@pytest.mark.parametrize(
    "config",
    [SD15, pytest.param(SDXL, marks=pytest.mark.slow), TINY, SMALL_SDXL],
    ids=["sd15", "sdxl", "tiny", "small_sdxl"],
)
def test_fewer_dispatches_than_diffusers(config: UNetConfig) -> None:
    """What a GPU waits for when it is faster than the host; counted on the meta device."""
    with torch.device("meta"):
        ours, reference = UNet(config), diffusers_unet(config)
    inputs = on_meta(config, 16)
    counted = dispatches(lambda: ours(**inputs))
    theirs = dispatches(lambda: reference_forward(reference, inputs))
    assert counted[0] < theirs[0] and counted[1] < theirs[1], (counted, theirs)


@pytest.mark.parametrize(
    "config, side, forward_gflop, both_gflop",
    [
        (SD15, 32, 180.1, 537.3),
        (SD15, 64, 803.3, 2406.8),
        pytest.param(SD15, 96, 2148, 6441, marks=pytest.mark.slow),
        (SD2, 64, 804.3, 2408.7),
        (SDXL, 32, 428, 1231),
        pytest.param(SDXL, 128, 6761, 20231, marks=pytest.mark.slow),
    ],
    ids=["sd15-32", "sd15-64", "sd15-96", "sd2-64", "sdxl-32", "sdxl-128"],
)
def test_flops_are_those_of_the_published_models(
    config: UNetConfig, side: int, forward_gflop: float, both_gflop: float
) -> None:
    """Two for a multiply-add, batch 1, 77 tokens, counted with diffusers 0.42.1's U-Net on the meta device."""
    with torch.device("meta"):
        unet = UNet(config)
    with FlopCounterMode(display=False) as counter:
        output = unet(**on_meta(config, side))
        forward = counter.get_total_flops() / 1e9
        output.sum().backward()
    both = counter.get_total_flops() / 1e9
    assert forward == pytest.approx(forward_gflop, rel=1.5e-3)
    assert both == pytest.approx(both_gflop, rel=1.5e-3)
