"""The cross-attention U-Net of latent diffusion, to be read beside LDM section 3.3 (Rombach et al. 2022).

Parameter names and shapes are those of `diffusers.UNet2DConditionModel`: a state dict goes either way with
`strict=True`. SD 1.x has 859,520,964 parameters, SD 2.x 865,910,724, SDXL base 2,567,463,684.

Level 0 is the finest, at the latent's own size; each level below halves the sides. Shape letters as in
`layers`: B batch, C channels, H W sides, L text tokens, D text width, E time width, P width of pooled text, S sizes.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.config import UNetConfig
from pipeline.models.layers import (
    Downsample,
    EmbeddingMLP,
    ResnetBlock,
    Run,
    SpatialTransformer,
    Upsample,
    repeat_rows,
    timestep_embedding,
)


class DownBlock(nn.Module):
    """One level on the way down: residual blocks, attention behind each or behind none."""

    def __init__(self, config: UNetConfig, level: int) -> None:
        super().__init__()
        channels = config.block_out_channels
        width, came_from = channels[level], channels[max(level - 1, 0)]
        attends = config.down_block_types[level] == "CrossAttnDownBlock2D"
        self.resnets, self.attentions = nn.ModuleList(), nn.ModuleList()
        for layer, depth in enumerate(config.depths_down(level)):
            self.resnets.append(ResnetBlock(width if layer else came_from, width, config))
            if attends:
                self.attentions.append(SpatialTransformer(width, config.heads(level), depth, config))
        lowest = level == len(channels) - 1
        self.downsamplers = nn.ModuleList([] if lowest else [Downsample(width)])

    def forward(
        self, x_BCHW: Tensor, time_BE: Tensor, text_BLD: Tensor, run: Run
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the map for the level below and every map that the way up will want back."""
        skips = []
        for layer, resnet in enumerate(self.resnets):
            x_BCHW = run(resnet, x_BCHW, time_BE)
            if self.attentions:
                x_BCHW = self.attentions[layer](x_BCHW, text_BLD, run)
            skips.append(x_BCHW)
        for downsample in self.downsamplers:
            x_BCHW = downsample(x_BCHW)
            skips.append(x_BCHW)
        return x_BCHW, skips


class MidBlock(nn.Module):
    """The bottom, at the lowest level's width: residual, attention, residual; without attention one residual."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        width, lowest = config.block_out_channels[-1], config.levels - 1
        attends = config.mid_block_type == "UNetMidBlock2DCrossAttn"
        first = ResnetBlock(width, width, config)
        self.attentions = nn.ModuleList()
        if attends:
            self.attentions.append(SpatialTransformer(width, config.heads(lowest), config.depth_mid, config))
        self.resnets = nn.ModuleList([first, ResnetBlock(width, width, config)] if attends else [first])

    def forward(self, x_BCHW: Tensor, time_BE: Tensor, text_BLD: Tensor, run: Run) -> Tensor:
        x_BCHW = run(self.resnets[0], x_BCHW, time_BE)
        for attention, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            x_BCHW = run(resnet, attention(x_BCHW, text_BLD, run), time_BE)
        return x_BCHW


class UpBlock(nn.Module):
    """One level on the way up: one residual block more than on the way down, each fed one of the skips."""

    def __init__(self, config: UNetConfig, level: int) -> None:
        super().__init__()
        channels = config.block_out_channels
        lowest = len(channels) - 1
        width, came_from = channels[level], channels[min(level + 1, lowest)]
        attends = config.up_block_types[lowest - level] == "CrossAttnUpBlock2D"
        self.resnets, self.attentions = nn.ModuleList(), nn.ModuleList()
        for layer, depth in enumerate(config.depths_up(level)):
            # The last skip of a level is what entered it on the way down, so it has the finer level's width.
            skip = channels[max(level - 1, 0)] if layer == config.layers(level) else width
            self.resnets.append(ResnetBlock((width if layer else came_from) + skip, width, config))
            if attends:
                self.attentions.append(SpatialTransformer(width, config.heads(level), depth, config))
        self.upsamplers = nn.ModuleList([Upsample(width)] if level else [])

    def forward(
        self,
        x_BCHW: Tensor,
        skips: list[Tensor],
        size: torch.Size | None,
        time_BE: Tensor,
        text_BLD: Tensor,
        run: Run,
    ) -> Tensor:
        """Return the map at `size`, the sides of the level above; None, and unused, at the finest level."""
        for layer, (resnet, skip) in enumerate(zip(self.resnets, reversed(skips), strict=True)):
            x_BCHW = run(resnet, torch.cat([x_BCHW, repeat_rows(skip, len(x_BCHW))], dim=1), time_BE)
            if self.attentions:
                x_BCHW = self.attentions[layer](x_BCHW, text_BLD, run)
        for upsample in self.upsamplers:
            x_BCHW = upsample(x_BCHW, size)
        return x_BCHW


class UNet(nn.Module):
    """Predicts noise (or v) from noisy latents, their timesteps and the text: epsilon_theta(z_t, t, tau(y)).

    `gradient_checkpointing` makes training keep only what enters each residual and transformer block, and
    compute the rest again in backward: a third more arithmetic, a fraction of the memory, the same gradients.

    Source: LDM equation 3 and section 3.3.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        channels = config.block_out_channels
        time_width = 4 * channels[0]
        self.config = config
        self.gradient_checkpointing = False
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = EmbeddingMLP(channels[0], time_width)
        self.add_embedding = None
        if config.projection_class_embeddings_input_dim is not None:
            self.add_embedding = EmbeddingMLP(config.projection_class_embeddings_input_dim, time_width)
        levels = range(config.levels)
        self._layers_up = [config.layers(level) + 1 for level in reversed(levels)]
        self.down_blocks = nn.ModuleList(DownBlock(config, level) for level in levels)
        self.mid_block = MidBlock(config) if config.mid_block_type else None
        self.up_blocks = nn.ModuleList(UpBlock(config, level) for level in reversed(levels))
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[0], config.norm_eps)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    def enable_gradient_checkpointing(self) -> None:
        """Trade arithmetic for memory in training from the next forward pass on; see the class."""
        self.gradient_checkpointing = True

    def forward(
        self,
        latents_BCHW: Tensor,
        timesteps_B: Tensor,
        text_BLD: Tensor,
        pooled_BP: Tensor | None = None,
        time_ids_BS: Tensor | None = None,
    ) -> Tensor:
        """Return the prediction [B, out_channels, H, W] in the latents' dtype, for any H and W.

        Latents and text have the model's dtype; timesteps may be integers or floats. SDXL alone takes the pooled
        text and sizes in pixels, for the base six: original (h, w), crop (top, left), target (h, w); its refiner
        takes an aesthetic score (2.5 to 6) in place of the target. There may be k times as many texts as latents, for
        guidance: rows n, n + B, ... are texts of latent n, the output has their number, and what precedes the first
        text (all before it but for the pooled text) is computed once.

        Raises:
            ValueError: an input's shape does not fit the config, or SDXL's inputs are missing, or not wanted.
        """
        self._check_shapes(latents_BCHW, timesteps_B, text_BLD, pooled_BP, time_ids_BS)
        run = self._checkpointed if self.gradient_checkpointing and torch.is_grad_enabled() else _straight
        time_BE = self._embed_time(latents_BCHW.dtype, timesteps_B, pooled_BP, time_ids_BS)

        x_BCHW = self.conv_in(repeat_rows(latents_BCHW, len(time_BE)))
        # Sliced, never popped inside a block: under ZeRO-3 a module receives copies of its list arguments.
        skips = [x_BCHW]
        for down_block in self.down_blocks:
            x_BCHW, made = down_block(x_BCHW, time_BE, text_BLD, run)
            skips = skips + made

        if self.mid_block is not None:
            x_BCHW = self.mid_block(x_BCHW, time_BE, text_BLD, run)

        for up_block, layers in zip(self.up_blocks, self._layers_up, strict=True):
            skips, taken = skips[:-layers], skips[-layers:]
            # The skip that comes next decides the size, so that sides that do not halve evenly work.
            size = skips[-1].shape[2:] if skips else None
            x_BCHW = up_block(x_BCHW, taken, size, time_BE, text_BLD, run)

        return self.conv_out(nn.functional.silu(self.conv_norm_out(repeat_rows(x_BCHW, len(text_BLD)))))

    def _embed_time(
        self, dtype: torch.dtype, timesteps_B: Tensor, pooled_BP: Tensor | None, time_ids_BS: Tensor | None
    ) -> Tensor:
        """Return [B, E]: the timestep, plus for SDXL the pooled text and the sizes (SDXL section 2.2).

        Activated once here, where diffusers does it in every residual block: the same numbers.
        """
        sinusoids = timestep_embedding(timesteps_B, self.config.block_out_channels[0])
        time_BE = self.time_embedding(sinusoids.to(dtype))
        if self.add_embedding is None:
            return nn.functional.silu(time_BE)
        width = self.config.addition_time_embed_dim
        assert width is not None and pooled_BP is not None and time_ids_BS is not None
        sizes = timestep_embedding(time_ids_BS.flatten(), width).unflatten(0, time_ids_BS.shape).flatten(1)
        added_BE = self.add_embedding(torch.cat([pooled_BP, sizes], dim=-1).to(dtype))
        return nn.functional.silu(repeat_rows(time_BE, len(added_BE)) + added_BE)

    def _check_shapes(
        self,
        latents_BCHW: Tensor,
        timesteps_B: Tensor,
        text_BLD: Tensor,
        pooled_BP: Tensor | None,
        time_ids_BS: Tensor | None,
    ) -> None:
        """Refuse what would broadcast or be left out without a word."""
        config, batch = self.config, latents_BCHW.shape[0]
        _expect("latents_BCHW", latents_BCHW, (batch, config.in_channels, None, None))
        _expect("timesteps_B", timesteps_B, (batch,))
        batch *= max(1, len(text_BLD) // max(1, batch))
        _expect("text_BLD", text_BLD, (batch, None, config.cross_attention_dim))
        sized, pooled_width = config.addition_time_embed_dim, config.projection_class_embeddings_input_dim
        if sized is None or pooled_width is None:
            _expect("pooled_BP", pooled_BP, None)
            _expect("time_ids_BS", time_ids_BS, None)
        else:
            _expect("time_ids_BS", time_ids_BS, (batch, None))
            sizes = 0 if time_ids_BS is None else time_ids_BS.shape[1]
            _expect("pooled_BP", pooled_BP, (batch, pooled_width - sizes * sized))

    def _checkpointed(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        # Reading the random state costs a call per block; only dropout would draw from it.
        draws = self.training and self.config.dropout > 0
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=draws)


def parameter_count(config: UNetConfig) -> int:
    """Return the number of parameters of `UNet(config)`; takes no memory: it is built on the meta device."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in UNet(config).parameters())


def _straight(block: nn.Module, *inputs: Tensor) -> Tensor:
    return block(*inputs)


def _expect(name: str, tensor: Tensor | None, shape: tuple[int | None, ...] | None) -> None:
    """Raise ValueError unless the tensor is there and fits the shape, or, where shape is None, is absent."""
    if tensor is None or shape is None:
        if (tensor is None) == (shape is None):
            return
    elif tensor.dim() == len(shape) and all(w in (None, n) for n, w in zip(tensor.shape, shape, strict=True)):
        return
    got = "None" if tensor is None else str(list(tensor.shape))
    need = "None: this config has no text_time embedding" if shape is None else str(list(shape))
    raise ValueError(f"UNet.forward: {name} is {got}, must be {need} (None in a shape: any size)")
