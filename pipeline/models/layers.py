"""Layers of the cross-attention U-Net; attributes have diffusers' names, so that state dicts go both ways.

Shape letters: B batch, C channels, H W sides of the feature map, N = H * W positions, L text tokens, D text
width, M tokens attended to (N in self-attention, L in cross-attention), E width of the time embedding (activated).

How an inner block is run is an argument (`run`): straight through, or checkpointed, so that backward computes
its activations again instead of keeping them. The U-Net decides; the layers only say where the seams are.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn

from pipeline.config import UNetConfig

Run = Callable[..., Tensor]


def timestep_embedding(timesteps_B: Tensor, width: int) -> Tensor:
    """Return [B, width] float32: cosines, then sines, at width // 2 frequencies from 1 down towards 1e-4.

    Always float32, whatever the model's dtype: bfloat16 cannot tell timestep 999 from 1000. Timesteps may be
    fractional; an odd width ends in a zero. Source: DDPM appendix B, after Vaswani et al. 2017, section 3.5.
    """
    half = width // 2
    exponents = -math.log(10_000) * torch.arange(half, dtype=torch.float32, device=timesteps_B.device) / half
    angles = timesteps_B[:, None].float() * torch.exp(exponents)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, width % 2))


def repeat_rows(x: Tensor, rows: int) -> Tensor:
    """Return x [B, ...] as [rows, ...], all of x again and again: latents that several texts share, for each text."""
    return x if len(x) == rows else x.repeat(rows // len(x), *[1] * (x.dim() - 1))


class EmbeddingMLP(nn.Module):
    """[B, width] -> [B, E]: sinusoids (SDXL: after the pooled text) to what every residual block receives."""

    def __init__(self, width: int, time_width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, time_width)
        self.linear_2 = nn.Linear(time_width, time_width)

    def forward(self, sinusoids: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(sinusoids)))


class ResnetBlock(nn.Module):
    """[B, C, H, W] and [B, E] -> [B, C', H, W]: two convolutions, the timestep added between, a way around.

    The only dropout of the U-Net sits here, before the second convolution. Source: DDPM appendix B.
    """

    def __init__(self, in_channels: int, out_channels: int, config: UNetConfig) -> None:
        super().__init__()
        groups, eps = config.norm_num_groups, config.norm_eps
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(4 * config.block_out_channels[0], out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x_BCHW: Tensor, time_BE: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x_BCHW)))
        h = h + repeat_rows(self.time_emb_proj(time_BE)[:, :, None, None], len(h))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + (x_BCHW if self.conv_shortcut is None else self.conv_shortcut(x_BCHW))


class Downsample(nn.Module):
    """[B, C, H, W] -> [B, C, ceil(H / 2), ceil(W / 2)] by a convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(x_BCHW)


class Upsample(nn.Module):
    """[B, C, H, W] -> [B, C, *size]: nearest neighbour, then a convolution.

    The size is that of the skip it will meet: twice this one, or one less where the way down rounded up.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor, size: torch.Size) -> Tensor:
        return self.conv(F.interpolate(x_BCHW, size=size, mode="nearest"))


REMEMBERED_TEXTS = 4
"""Texts that a layer remembers while sampling: guidance has three, with both halves, one half and the other."""


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(d)) V: queries from the latent, keys and values from a context, d channels a head.

    The context is the text in cross-attention (attn2), the latent itself in self-attention (attn1). In the
    paper's letters Q = W_Q phi(z_t), K = W_K tau(y), V = W_V tau(y). Source: LDM section 3.3.
    """

    def __init__(self, channels: int, context_width: int, heads: int) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(
                f"unet.attention_head_dim: {heads} heads do not divide {channels} channels; give a divisor"
            )
        self.heads = heads
        # Set by `models.text_memory` while sampling, where every step attends to the same text.
        self.memory: dict[int, tuple[Tensor, Tensor, Tensor]] | None = None
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_width, channels, bias=False)
        self.to_v = nn.Linear(context_width, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, latent_BNC: Tensor, context_BMD: Tensor) -> Tensor:
        query = self._split_heads(self.to_q(latent_BNC))
        key, value = self._keys_values(context_BMD)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.to_out[0](attended.transpose(1, 2).flatten(2))

    def _keys_values(self, context_BMD: Tensor) -> tuple[Tensor, Tensor]:
        if self.memory is None:
            return self._split_heads(self.to_k(context_BMD)), self._split_heads(self.to_v(context_BMD))
        if id(context_BMD) not in self.memory:
            if len(self.memory) == REMEMBERED_TEXTS:
                self.memory.clear()
            made = self._split_heads(self.to_k(context_BMD)), self._split_heads(self.to_v(context_BMD))
            self.memory[id(context_BMD)] = (context_BMD, *made)
        return self.memory[id(context_BMD)][1:]

    def _split_heads(self, tokens: Tensor) -> Tensor:
        """[B, tokens, C] -> [B, heads, tokens, C / heads], the layout of `scaled_dot_product_attention`."""
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class GEGLU(nn.Module):
    """[..., C] -> [..., inner]: half of a projection, gated by GELU of the other. Source: Shazeer 2020."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * inner)

    def forward(self, tokens: Tensor) -> Tensor:
        value, gate = self.proj(tokens).chunk(2, dim=-1)
        if torch.is_grad_enabled():
            return value * F.gelu(gate)
        # In place: new memory for both would cost 6 % of a small U-Net's time.
        return value.mul_(torch.ops.aten.gelu_(gate))


class FeedForward(nn.Module):
    """[..., C] -> [..., C] through 4 C gated units, position by position."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = 4 * channels
        # Index 1 is a dropout in diffusers, which its U-Net leaves at 0: it keeps the names net.0 and net.2.
        self.net = nn.Sequential(GEGLU(channels, inner), nn.Identity(), nn.Linear(inner, channels))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net(tokens)


class TransformerBlock(nn.Module):
    """[B, N, C] and [B, L, D] -> [B, N, C]: attention to the latent, attention to the text, feed-forward.

    Source: LDM section 3.3; attn2 is the row of Q, K, V boxes of its figure 3.
    """

    def __init__(self, channels: int, heads: int, text_width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, context_width=channels, heads=heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, context_width=text_width, heads=heads)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, latent_BNC: Tensor, text_BLD: Tensor) -> Tensor:
        normed = self.norm1(latent_BNC)
        latent_BNC = repeat_rows(latent_BNC + self.attn1(normed, normed), len(text_BLD))
        latent_BNC = latent_BNC + self.attn2(self.norm2(latent_BNC), text_BLD)
        return latent_BNC + self.ff(self.norm3(latent_BNC))


class Pointwise(nn.Conv2d):
    """[B, C, H, W] -> [B, C, H, W] by a 1 x 1 convolution: one operator in training, a faster product in sampling."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(x_BCHW)
        return _to_map(F.linear(_to_tokens(x_BCHW), self.weight.flatten(1), self.bias), x_BCHW.shape[2:])


class SpatialTransformer(nn.Module):
    """[B, C, H, W] and [B, L, D] -> [B, C, H, W]: the map as H * W tokens through `depth` transformer blocks.

    SD 1.x projects in and out by 1 x 1 convolutions, SD 2.x and SDXL by linear layers: the same function, but
    weights of other shapes, so both stay. Latents that several texts share part ways at their first text.
    """

    def __init__(self, channels: int, heads: int, depth: int, config: UNetConfig) -> None:
        super().__init__()
        # 1e-6 here, norm_eps elsewhere: CompVis wrote it so, and all published weights were trained with it.
        self.norm = nn.GroupNorm(config.norm_num_groups, channels, eps=1e-6)
        self.linear = config.use_linear_projection
        self.proj_in = nn.Linear(channels, channels) if self.linear else Pointwise(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, heads, config.cross_attention_dim) for _ in range(depth)
        )
        self.proj_out = nn.Linear(channels, channels) if self.linear else Pointwise(channels, channels, 1)

    def forward(self, x_BCHW: Tensor, text_BLD: Tensor, run: Run) -> Tensor:
        h, size = self.norm(x_BCHW), x_BCHW.shape[2:]
        tokens_BNC = self.proj_in(_to_tokens(h)) if self.linear else _to_tokens(self.proj_in(h))
        for block in self.transformer_blocks:
            tokens_BNC = run(block, tokens_BNC, text_BLD)
        x_BCHW = repeat_rows(x_BCHW, len(text_BLD))
        if self.linear:
            return x_BCHW + _to_map(self.proj_out(tokens_BNC), size)
        return x_BCHW + self.proj_out(_to_map(tokens_BNC, size))


def _to_tokens(x_BCHW: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, N, C], contiguous: all that follows reads token by token."""
    return x_BCHW.flatten(2).transpose(1, 2).contiguous()


def _to_map(tokens_BNC: Tensor, size: torch.Size) -> Tensor:
    """[B, N, C] -> [B, C, H, W]."""
    return tokens_BNC.transpose(1, 2).unflatten(2, size)
