"""The reconstruction grid: pictures above, what the autoencoder makes of them below."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.models.autoencoder import AutoencoderKL, moments_of
from pipeline.models.pixels import pixels_from_images

COLUMNS, MARGIN, BACKGROUND = 8, 4, (128, 128, 128)


@torch.no_grad()
def draw_reconstructions(model: AutoencoderKL, batches: Sequence[Tensor]) -> Image.Image:
    """Return images [B, 3, H, W] and the decoded means of their posteriors, at their own size, eight in a row."""
    images_BCHW = torch.cat(list(batches))
    decoded_BCHW = torch.cat([model.decode(moments_of(model, batch)[0]).sample for batch in batches])
    pairs = list(zip(pixels_from_images(images_BCHW), pixels_from_images(decoded_BCHW), strict=True))
    height, width, _ = pairs[0][0].shape
    rows = -(-len(pairs) // COLUMNS)
    size = (COLUMNS * (width + MARGIN) + MARGIN, rows * (2 * height + MARGIN) + MARGIN)
    grid = Image.new("RGB", size, BACKGROUND)
    for place, pair in enumerate(pairs):
        row, column = divmod(place, COLUMNS)
        corner = (MARGIN + column * (width + MARGIN), MARGIN + row * (2 * height + MARGIN))
        grid.paste(Image.fromarray(np.concatenate(pair)), corner)
    return grid
