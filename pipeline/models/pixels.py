"""Pixels (uint8, B H W 3) to images (float, B 3 H W, in [-1, 1]) and back: the one home of this convention.

Latents made from images in [0, 1] look plausible and are wrong everywhere downstream, so the range has one
definition, and encoders refuse whatever lies outside of it. Shape letters: B batch, C channels, H W sides.
"""

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import DataError

HALF_RANGE = 127.5
RANGE_TOLERANCE = 1e-4


def images_from_pixels(pixels_BHWC: np.ndarray | Tensor) -> Tensor:
    """Return fp32 images [B, C, H, W] in [-1, 1] from uint8 pixels [B, H, W, C]: 0 -> -1, 255 -> 1."""
    pixels = torch.as_tensor(pixels_BHWC)
    if pixels.dtype != torch.uint8 or pixels.ndim != 4:
        raise DataError(
            f"pixels: {pixels.dtype} of shape {tuple(pixels.shape)}; expected uint8 of shape [B, H, W, C]"
        )
    return pixels.permute(0, 3, 1, 2).contiguous().float() / HALF_RANGE - 1.0


def pixels_from_images(images_BCHW: Tensor) -> np.ndarray:
    """Return uint8 pixels [B, H, W, C] from images [B, C, H, W] in [-1, 1], rounded and cut at the ends."""
    pixels = (images_BCHW.detach().float() + 1.0).mul(HALF_RANGE).round().clamp(0, 255)
    return pixels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def require_image_range(images_BCHW: Tensor) -> None:
    """Refuse anything but floating images [B, 3, H, W] whose values are finite and inside [-1, 1].

    Raises:
        DataError: naming what was found, and how pixels become images.
    """
    if not images_BCHW.is_floating_point() or images_BCHW.ndim != 4 or images_BCHW.shape[1] != 3:
        raise DataError(
            f"images: {images_BCHW.dtype} of shape {tuple(images_BCHW.shape)}; expected a floating type and "
            f"shape [B, 3, H, W]; make them with images_from_pixels"
        )
    if images_BCHW.numel() == 0:
        return
    low, high = (float(bound) for bound in images_BCHW.aminmax())
    if not (low >= -1.0 - RANGE_TOLERANCE and high <= 1.0 + RANGE_TOLERANCE):
        raise DataError(
            f"images: values from {low:g} to {high:g}; expected [-1, 1]; make them with images_from_pixels"
        )
