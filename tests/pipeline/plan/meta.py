"""Counts of the real networks on the meta device: the oracle of the tables in `pipeline/plan`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import UNetConfig
from pipeline.config_file import load_config
from pipeline.models.unet import UNet

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = {"sd15": "sd15-512", "sd2": "sd2-512", "sdxl": "sdxl-1024", "demo": "demo"}


@dataclass(frozen=True)
class Counted:
    """One training sample of a U-Net."""

    parameters: int
    tensors: int
    forward_flops: int
    backward_flops: int
    kept_bytes: int


def unet_config(name: str) -> UNetConfig:
    return load_config(ROOT / "configs" / f"{CONFIGS[name]}.yaml").model


class _Flash(torch.autograd.Function):
    """Attention that keeps what the fused kernels keep: queries, keys, values and its result, no matrix of scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attended = torch.empty_like(query.transpose(1, 2)).transpose(1, 2)
        ctx.save_for_backward(query, key, value, attended)
        return attended

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise AssertionError("only the forward pass is run")


def count_unet(config: UNetConfig, side: int, tokens: int) -> Counted:
    with torch.device("meta"):
        network = UNet(config)
        inputs = _inputs(config, side, tokens, torch.float32)
    with FlopCounterMode(display=False) as forward:
        prediction = network(*inputs)
    with FlopCounterMode(display=False) as backward:
        prediction.sum().backward()
    parameters = list(network.parameters())
    return Counted(
        sum(parameter.numel() for parameter in parameters),
        len(parameters),
        forward.get_total_flops(),
        backward.get_total_flops(),
        kept_bytes(config, side, tokens),
    )


def kept_bytes(config: UNetConfig, side: int, tokens: int, *, checkpointing: bool = False) -> int:
    """Return the bytes of distinct storages that one bfloat16 sample keeps for its backward pass."""
    with torch.device("meta"):
        network = UNet(config).to(torch.bfloat16)
        inputs = _inputs(config, side, tokens, torch.bfloat16)
    weights = {weight.untyped_storage()._cdata for weight in network.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in weights:
            kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    def only_inputs(_: UNet, block: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
        for argument in arguments:
            pack(argument)
        with torch.no_grad():
            made = block(*arguments)
        return made.requires_grad_()

    patches = [mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", _Flash.apply)]
    if checkpointing:
        network.enable_gradient_checkpointing()
        patches.append(mock.patch.object(UNet, "_checkpointed", only_inputs))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for patch in patches:
            patch.start()
        try:
            network(*inputs)
        finally:
            for patch in patches:
                patch.stop()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def flops_of(run: Callable[[], object]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        run()
    return counted.get_total_flops()


def _inputs(config: UNetConfig, side: int, tokens: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    latents = torch.empty(1, config.in_channels, side, side, dtype=dtype)
    inputs = [latents, torch.zeros(1), torch.empty(1, tokens, config.cross_attention_dim, dtype=dtype)]
    if config.addition_embed_type:
        inputs += [torch.empty(1, 1280, dtype=dtype), torch.empty(1, 6)]
    return tuple(inputs)
