"""What a pass costs, without a clock: operators dispatched beside diffusers', and FLOPs on the meta device."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import UNetConfig
from pipeline.models.unet import UNet
from tests.pipeline.models.unets import (
    REFINER,
    SD2,
    SD15,
    SDXL,
    SMALL_SDXL,
    TINY,
    diffusers_unet,
    random_inputs,
    reference_forward,
)


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
