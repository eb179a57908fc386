"""Arithmetic, weights and kept activations of the U-Net for one sample, layer by layer in closed form.

The walk mirrors `models.unet`; the tests hold every count against that network on the meta device. One multiply and
add are two FLOP, attention's matrix products included: the often quoted 338.7 GMAC of SD 1.x leave those out.
"""

from dataclasses import dataclass

from pipeline.config import UNetConfig


@dataclass(frozen=True)
class NetworkCost:
    """What one sample costs; elements are numbers, whatever type they have."""

    parameters: int
    tensors: int
    forward_flops: int
    backward_flops: int
    norm_elements: int
    """Kept for backward by norms and activations: float32 under autocast."""
    matmul_elements: int
    """Kept for backward by convolutions, linear layers and attention."""
    largest_block_elements: int
    """With activation checkpointing: what the largest block computes again and keeps meanwhile."""

    @property
    def training_flops(self) -> int:
        """FLOP of forward and backward."""
        return self.forward_flops + self.backward_flops

    def activation_bytes(self, precision: str) -> int:
        """Return the bytes a sample keeps until its backward pass, eager, attention without its matrix of scores."""
        wide, narrow = {"fp32": (4, 4), "autocast_bf16": (4, 2)}.get(precision, (2, 2))
        recomputed = narrow * self.largest_block_elements
        return wide * self.norm_elements + narrow * self.matmul_elements + recomputed


class _Tally:
    """Adds up layers; inside a checkpointed block what it keeps is counted apart."""

    def __init__(self, checkpointing: bool) -> None:
        self.checkpointing = checkpointing
        self.parameters = self.tensors = self.forward = self.backward = 0
        self.norms = self.matmuls = self.inside = self.largest = 0
        self._in_block = False

    def matmul(
        self, shape: tuple[int, int], rows: int, *, bias: bool, grad: bool = True, kernel: int = 1
    ) -> None:
        """Count a linear layer or convolution over `rows` positions; `grad`: its input needs a gradient."""
        inner, outer = shape[0] * kernel * kernel, shape[1]
        self.parameters += inner * outer + (outer if bias else 0)
        self.tensors += 2 if bias else 1
        flops = 2 * rows * inner * outer
        self.forward += flops
        self.backward += flops * (2 if grad else 1)

    def attend(self, queries: int, keys: int, width: int) -> None:
        """Count both matrix products of attention; their four gradients cost twice as much."""
        self.forward += 4 * queries * keys * width
        self.backward += 8 * queries * keys * width

    def norm(self, width: int) -> None:
        """Count a norm's weight and bias."""
        self.parameters += 2 * width
        self.tensors += 2

    def keep(self, *, norms: int = 0, matmuls: int = 0) -> None:
        """Count elements kept for backward."""
        if self._in_block:
            self.inside += norms + matmuls
        else:
            self.norms += norms
            self.matmuls += matmuls

    def enter(self, input_elements: int) -> None:
        """Begin a block that checkpointing runs again: only its input is kept."""
        if self.checkpointing:
            self.matmuls += input_elements
            self._in_block, self.inside = True, 0

    def leave(self) -> None:
        """End that block."""
        self.largest = max(self.largest, self.inside)
        self._in_block = False


@dataclass(frozen=True)
class _Map:
    """A feature map's channels and sides."""

    channels: int
    height: int
    width: int

    @property
    def positions(self) -> int:
        return self.height * self.width

    @property
    def elements(self) -> int:
        return self.channels * self.positions

    def halved(self) -> "_Map":
        return _Map(self.channels, -(-self.height // 2), -(-self.width // 2))


def network_cost(
    config: UNetConfig, side: int | tuple[int, int], text_tokens: int, *, checkpointing: bool = False
) -> NetworkCost:
    """Return what one latent of `side` (or height, width) and a text of so many tokens cost in training."""
    height, width = (side, side) if isinstance(side, int) else side
    tally, channels = _Tally(checkpointing), config.block_out_channels
    first = _Map(channels[0], height, width)
    tally.matmul((config.in_channels, channels[0]), first.positions, bias=True, grad=False, kernel=3)
    tally.keep(matmuls=config.in_channels * first.positions + text_tokens * config.cross_attention_dim)
    _count_embeddings(tally, config)
    skips, here = [first], first
    for level in range(config.levels):
        here = _down(tally, config, level, here, skips, text_tokens)
    if config.mid_block_type:
        here = _mid(tally, config, here, text_tokens)
    for level in reversed(range(config.levels)):
        here = _up(tally, config, level, here, skips, text_tokens)
    tally.norm(channels[0])
    tally.keep(norms=2 * here.elements, matmuls=here.elements)
    tally.matmul((channels[0], config.out_channels), here.positions, bias=True, kernel=3)
    return NetworkCost(
        tally.parameters,
        tally.tensors,
        tally.forward,
        tally.backward,
        tally.norms,
        tally.matmuls,
        tally.largest,
    )


def _count_embeddings(tally: _Tally, config: UNetConfig) -> None:
    wide = 4 * config.block_out_channels[0]
    sources = [config.block_out_channels[0]]
    if config.projection_class_embeddings_input_dim is not None:
        sources.append(config.projection_class_embeddings_input_dim)
    for source in sources:
        tally.matmul((source, wide), 1, bias=True, grad=False)
        tally.matmul((wide, wide), 1, bias=True)


def _down(
    tally: _Tally, config: UNetConfig, level: int, here: _Map, skips: list[_Map], text_tokens: int
) -> _Map:
    attends = config.down_block_types[level] == "CrossAttnDownBlock2D"
    for depth in config.depths_down(level):
        here = _resnet(tally, config, here, config.block_out_channels[level])
        if attends:
            _transformer(tally, config, level, here, depth, text_tokens)
        skips.append(here)
    if level < config.levels - 1:
        tally.keep(matmuls=here.elements)
        here = here.halved()
        tally.matmul((here.channels, here.channels), here.positions, bias=True, kernel=3)
        skips.append(here)
    return here


def _mid(tally: _Tally, config: UNetConfig, here: _Map, text_tokens: int) -> _Map:
    here = _resnet(tally, config, here, here.channels)
    if config.mid_block_type == "UNetMidBlock2DCrossAttn":
        _transformer(tally, config, config.levels - 1, here, config.depth_mid, text_tokens)
        here = _resnet(tally, config, here, here.channels)
    return here


def _up(
    tally: _Tally, config: UNetConfig, level: int, here: _Map, skips: list[_Map], text_tokens: int
) -> _Map:
    # `up_block_types` runs from the deepest level to the finest.
    attends = config.up_block_types[config.levels - 1 - level] == "CrossAttnUpBlock2D"
    for depth in config.depths_up(level):
        joined = _Map(here.channels + skips.pop().channels, here.height, here.width)
        here = _resnet(tally, config, joined, config.block_out_channels[level])
        if attends:
            _transformer(tally, config, level, here, depth, text_tokens)
    if level:
        here = _Map(here.channels, skips[-1].height, skips[-1].width)
        tally.keep(matmuls=here.elements)
        tally.matmul((here.channels, here.channels), here.positions, bias=True, kernel=3)
    return here


def _resnet(tally: _Tally, config: UNetConfig, here: _Map, channels: int) -> _Map:
    out = _Map(channels, here.height, here.width)
    tally.norm(here.channels)
    tally.matmul((here.channels, channels), here.positions, bias=True, kernel=3)
    tally.matmul((4 * config.block_out_channels[0], channels), 1, bias=True)
    tally.norm(channels)
    tally.matmul((channels, channels), here.positions, bias=True, kernel=3)
    if here.channels != channels:
        tally.matmul((here.channels, channels), here.positions, bias=True)
    tally.enter(here.elements)
    # Both norms keep what enters them, both SiLU too, both convolutions keep what SiLU made.
    tally.keep(norms=2 * (here.elements + out.elements), matmuls=here.elements + out.elements)
    tally.leave()
    return out


def _transformer(
    tally: _Tally, config: UNetConfig, level: int, here: _Map, depth: int, text_tokens: int
) -> None:
    width, rows = here.channels, here.positions
    tally.norm(width)
    tally.matmul((width, width), rows, bias=True)
    tally.keep(norms=here.elements, matmuls=here.elements)
    for _ in range(depth):
        tally.enter(here.elements)
        for keys, source, grad in ((rows, width, True), (text_tokens, config.cross_attention_dim, False)):
            tally.norm(width)
            tally.matmul((width, width), rows, bias=False)
            for _ in "kv":
                tally.matmul((source, width), keys, bias=False, grad=grad)
            tally.attend(rows, keys, width)
            tally.matmul((width, width), rows, bias=True)
            # In, normed, query, key, value, out; a float32 logarithm a row and head is too small to count.
            tally.keep(norms=here.elements, matmuls=3 * here.elements + 2 * keys * width)
        tally.norm(width)
        tally.matmul((width, 8 * width), rows, bias=True)
        tally.matmul((4 * width, width), rows, bias=True)
        tally.keep(norms=(1 + 8 + 4) * here.elements, matmuls=(1 + 4) * here.elements)
        tally.leave()
    tally.keep(matmuls=here.elements)
    tally.matmul((width, width), rows, bias=True)
