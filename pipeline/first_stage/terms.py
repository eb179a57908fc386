"""The terms of the autoencoder's loss, each a pure function of tensors with its equation.

Source: Rombach et al. 2022, appendix G; Esser et al. 2021 ("Taming Transformers"), eq. 3-7; Zhang et al. 2018 (LPIPS),
eq. 1. Shape letters: B batch, C channels, H W sides of the image, h w of a latent or a feature map.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

# Largest factor that the ratio of gradients may give the adversarial term, and what keeps the ratio finite (VQGAN).
MAX_ADAPTIVE, ADAPTIVE_FLOOR = 1e4, 1e-4
# Keeps the length of an all-zero feature column from dividing by zero (LPIPS).
LENGTH_FLOOR = 1e-10


def l1_loss(decoded_BCHW: Tensor, images_BCHW: Tensor) -> Tensor:
    """Return mean |x' - x| over all values, a scalar."""
    return (decoded_BCHW - images_BCHW).abs().mean()


def gradient_l1_loss(decoded_BCHW: Tensor, images_BCHW: Tensor) -> Tensor:
    """Return mean |dy e| + mean |dx e| of the error e = x' - x, with d the difference of neighbouring pixels.

    An error that is constant costs nothing here, one at an edge costs twice: edges come out sharper than by L1 alone.
    """
    error_BCHW = decoded_BCHW - images_BCHW
    return error_BCHW.diff(dim=2).abs().mean() + error_BCHW.diff(dim=3).abs().mean()


def kl_loss(mean_BChw: Tensor, logvar_BChw: Tensor, image_values: int) -> Tensor:
    """Return KL(N(mean, exp logvar) || N(0, 1)) = 1/2 sum(mean^2 + exp(logvar) - 1 - logvar), a value of the image.

    LDM sums L1 and KL over the picture; both are divided by `image_values` (B 3 H W) here, so neither the learning
    rate nor the weight depends on the picture's size.
    """
    return 0.5 * (mean_BChw.square() + logvar_BChw.exp() - 1.0 - logvar_BChw).sum() / image_values


def unit_columns(features_BChw: Tensor) -> Tensor:
    """Return the features with every column over C at length 1 (0 stays 0)."""
    length = features_BChw.square().sum(dim=1, keepdim=True).add(LENGTH_FLOOR).sqrt()
    return features_BChw / length


def feature_distances(
    decoded: Sequence[Tensor], images: Sequence[Tensor], channel_weights: Sequence[Tensor | None]
) -> Tensor:
    """Return for each picture sum_l mean_hw sum_c w_lc (u_l(x') - u_l(x))^2, [B], with u_l the unit columns of tap l.

    Without channel weights w = 1 / 2, so that a tap's part lies in [0, 2]: it is 1 - the mean cosine of the columns.
    Source: Zhang et al. 2018, eq. 1; their weights are learnt from human judgements.
    """
    total = torch.zeros(len(decoded[0]), device=decoded[0].device)
    for one, other, weights in zip(decoded, images, channel_weights, strict=True):
        squares = (unit_columns(one.float()) - unit_columns(other.float())).square()
        weighted = 0.5 * squares if weights is None else squares * weights[:, None, None]
        total = total + weighted.sum(dim=1).mean(dim=(1, 2))
    return total


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Return 1/2 (mean max(0, 1 - D(x)) + mean max(0, 1 + D(x'))): 1 for a blind D, 0 where it wins outright.

    Source: Lim and Ye 2017, eq. 22; halved as in VQGAN's code.
    """
    return 0.5 * (functional.relu(1.0 - real_logits).mean() + functional.relu(1.0 + fake_logits).mean())


def hinge_generator_loss(fake_logits: Tensor) -> Tensor:
    """Return -mean D(x'). Source: Lim and Ye 2017, eq. 23."""
    return -fake_logits.mean()


def adaptive_weight(reconstruction_gradient: Tensor, adversarial_gradient: Tensor) -> Tensor:
    """Return |g_rec| / (|g_adv| + 1e-4), at most 1e4: both gradients then have the same length at the last layer.

    The gradients are those of the global batch with respect to the decoder's last kernel.
    Source: Esser et al. 2021, eq. 7.
    """
    ratio = reconstruction_gradient.norm() / (adversarial_gradient.norm() + ADAPTIVE_FLOOR)
    return ratio.clamp(0.0, MAX_ADAPTIVE).detach()
