"""Where in the picture each token of its text is attended to, recorded while a network paints.

Shape letters: B pictures, N positions of a feature map of h x w, L text tokens, H W sides of the latents.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn

from pipeline.models.layers import Attention, SpatialTransformer, TransformerBlock


class AttentionMaps:
    """The mean of softmax(Q K^T / sqrt(d)) over heads, layers and calls, each map brought to the latents' size."""

    def __init__(self, pictures: int, size: tuple[int, int]) -> None:
        """Begin with nothing, for `pictures` latents of `size` (H, W)."""
        self._pictures, self._size = pictures, size
        self._sum_BLHW: Tensor | None = None
        self._count = 0

    @torch.no_grad()
    def add(
        self, attention: Attention, latent_BNC: Tensor, text_BLD: Tensor, map_size: tuple[int, int]
    ) -> None:
        """Add one call of a cross-attention layer; of several texts a picture the last counts: under guidance, the prompt.

        The probabilities are computed a second time, because the fused kernel that paints never makes them.
        """
        rows = slice(-self._pictures, None)
        query = attention.to_q(latent_BNC[rows]).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        key = attention.to_k(text_BLD[rows]).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        scores = query.float() @ key.float().transpose(-1, -2) * query.shape[-1] ** -0.5
        shares_BLN = scores.softmax(dim=-1).mean(dim=1).transpose(1, 2)
        maps_BLHW = F.interpolate(shares_BLN.unflatten(-1, map_size), self._size, mode="bilinear")
        self._sum_BLHW = maps_BLHW if self._sum_BLHW is None else self._sum_BLHW + maps_BLHW
        self._count += 1

    def mean(self) -> Tensor:
        """Return float32 [B, L, H, W]: at each position the shares of the tokens, which add up to 1.

        Source: Tang et al. 2022 (DAAM), eq. 5, with the mean for their sum.
        """
        assert self._sum_BLHW is not None, "a U-Net with cross-attention has painted"
        return self._sum_BLHW / self._count


@contextmanager
def attention_recorded(network: nn.Module, pictures: int, size: tuple[int, int]) -> Iterator[AttentionMaps]:
    """Record every cross-attention of `network` inside the block, for `pictures` latents of `size` at once."""
    maps, hooks = AttentionMaps(pictures, size), []
    for transformer in network.modules():
        if isinstance(transformer, SpatialTransformer):
            hooks += _hooks(transformer, maps)
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()


def _hooks(transformer: SpatialTransformer, maps: AttentionMaps) -> list[torch.utils.hooks.RemovableHandle]:
    """Let `transformer` tell `maps` of its cross-attention: its own input says how the positions lie."""
    size = (0, 0)

    def enter(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal size
        size = (inputs[0].shape[-2], inputs[0].shape[-1])

    def attend(module: nn.Module, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        assert isinstance(module, Attention)
        maps.add(module, *inputs, size)

    blocks = [module for module in transformer.modules() if isinstance(module, TransformerBlock)]
    return [
        transformer.register_forward_pre_hook(enter),
        *(block.attn2.register_forward_hook(attend) for block in blocks),
    ]
