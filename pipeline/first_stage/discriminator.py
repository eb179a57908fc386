"""The patch discriminator: a stack of strided convolutions, one logit for each overlapping patch.

Source: Isola et al. 2017, appendix 6.1.2, as in VQGAN. Norms are GroupNorm instead of BatchNorm: a picture's logits
then depend on no other picture, so a batch split over processes gives the numbers of the whole one.
"""

import math

import torch
from torch import Tensor, nn

from pipeline.config import AdversarialConfig

SLOPE = 0.2
GROUPS = 8
INIT_STD = 0.02


class PatchDiscriminator(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] to logits [B, 1, h, w]: positive means "a picture", negative "a reconstruction"."""

    def __init__(self, config: AdversarialConfig) -> None:
        """Draw `config.layers` halvings, doubling `config.width` up to eightfold, from torch's generator."""
        super().__init__()
        layers: list[nn.Module] = []
        width = 3
        for number in range(config.layers):
            wider = config.width * min(2**number, 8)
            layers.append(nn.Conv2d(width, wider, 4, stride=2, padding=1))
            if number:
                layers.append(nn.GroupNorm(math.gcd(GROUPS, wider), wider))
            layers.append(nn.LeakyReLU(SLOPE))
            width = wider
        layers.append(nn.Conv2d(width, 1, 3, padding=1))
        self.layers = nn.Sequential(*layers)
        for module in self.layers:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=INIT_STD)
                nn.init.zeros_(module.bias) if module.bias is not None else None

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return the logits of the patches."""
        logits: Tensor = self.layers(images_BCHW)
        return logits

    def frozen(self, images_BCHW: Tensor) -> Tensor:
        """Return the logits with a gradient to the images and none to the discriminator's own weights."""
        held = {name: parameter.detach() for name, parameter in self.named_parameters()}
        logits: Tensor = torch.func.functional_call(self, held, (images_BCHW,))
        return logits
