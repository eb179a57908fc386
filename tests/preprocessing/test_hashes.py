"""A perceptual hash is that of the definition, near for copies and far for other pictures."""

import io
from itertools import combinations

import numpy as np
from PIL import Image

from preprocessing.hashes import difference_hash, hash_distance
from tests.preprocessing.builders import noise

HEIGHT, WIDTH = 80, 90
"""Nine cells across and eight down of ten pixels a side: halved first, then averaged, without interpolation."""


def picture(seed: int) -> np.ndarray:
    coarse = Image.fromarray(noise(seed, 6, 6)).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    return np.asarray(coarse)


def differences(pixels: np.ndarray) -> np.ndarray:
    """Return by how much each of the 64 right neighbours is brighter, from the exact means of the 8 x 9 cells."""
    grey = np.asarray(Image.fromarray(pixels).convert("L")).astype(float)
    return np.diff(grey.reshape(8, HEIGHT // 8, 9, WIDTH // 9).mean(axis=(1, 3)), axis=1).ravel()


def test_the_bits_are_those_of_the_definition() -> None:
    """dHash: one bit a pair of neighbours, row by row, 1 where the right one is brighter; nearly equal ones are open."""
    decided = 0
    for seed in range(20):
        growth = differences(picture(seed))
        bits = np.array([int(bit) for bit in f"{int(difference_hash(picture(seed)), 16):064b}"])
        clear = np.abs(growth) > 2
        assert np.array_equal(bits[clear], growth[clear] > 0)
        decided += int(clear.sum())
    assert decided > 0.9 * 20 * 64
    ramp = np.tile(np.linspace(0, 255, WIDTH).astype(np.uint8)[None, :, None], (HEIGHT, 1, 3))
    assert difference_hash(ramp) == "f" * 16 and difference_hash(ramp[:, ::-1]) == "0" * 16


def test_copies_are_near_and_others_far() -> None:
    pictures = [picture(seed) for seed in range(12)]
    hashes = [difference_hash(pixels) for pixels in pictures]
    for pixels, found in zip(pictures, hashes, strict=True):
        stream = io.BytesIO()
        Image.fromarray(pixels).resize((100, 100)).save(stream, "JPEG", quality=60)
        with Image.open(stream) as copy:
            assert hash_distance(difference_hash(np.asarray(copy.convert("RGB"))), found) <= 8
        assert hash_distance(difference_hash((pixels * 0.8 + 20).astype(np.uint8)), found) <= 4
    assert min(hash_distance(a, b) for a, b in combinations(hashes, 2)) > 10


def test_distance_counts_bits() -> None:
    assert hash_distance("0" * 16, "f" * 16) == 64 and hash_distance("8" + "0" * 15, "0" * 16) == 1
