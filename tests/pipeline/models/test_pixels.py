"""Pixels and images: the ends of the range, the way back, and what is refused."""

import numpy as np
import pytest
import torch

from pipeline.errors import DataError
from pipeline.models.pixels import images_from_pixels, pixels_from_images, require_image_range


def test_every_pixel_value_comes_back() -> None:
    pixels = np.arange(256 * 3, dtype=np.uint8).reshape(2, 16, 8, 3)
    images = images_from_pixels(pixels)
    assert images.shape == (2, 3, 16, 8) and images.dtype == torch.float32
    assert float(images.min()) == -1.0 and float(images.max()) == 1.0
    assert images[1, 2, 3, 4] == pixels[1, 3, 4, 2] / 127.5 - 1.0
    np.testing.assert_array_equal(pixels_from_images(images), pixels)
    np.testing.assert_array_equal(
        pixels_from_images(images * 3.0)[images.permute(0, 2, 3, 1).numpy() > 0.4], 255
    )


@pytest.mark.parametrize(
    "images",
    [
        torch.full((1, 3, 4, 4), 255.0),
        torch.full((1, 3, 4, 4), -1.01),
        torch.full((1, 3, 4, 4), float("nan")),
        torch.zeros((1, 3, 4, 4), dtype=torch.uint8),
        torch.zeros((1, 4, 4, 3)),
        torch.zeros((3, 4, 4)),
    ],
)
def test_other_ranges_types_and_shapes_are_refused(images: torch.Tensor) -> None:
    with pytest.raises(DataError, match="make them with images_from_pixels"):
        require_image_range(images)


def test_the_range_itself_passes() -> None:
    require_image_range(torch.linspace(-1, 1, 48).reshape(1, 3, 4, 4))
    require_image_range(torch.zeros(0, 3, 4, 4))


@pytest.mark.parametrize("pixels", [np.zeros((1, 4, 4, 3), np.float32), np.zeros((4, 4, 3), np.uint8)])
def test_only_uint8_batches_are_pixels(pixels: np.ndarray) -> None:
    with pytest.raises(DataError, match="expected uint8 of shape"):
        images_from_pixels(pixels)
