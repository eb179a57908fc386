"""Fingerprints of a picture, one row each: of its bytes, and of what it looks like."""

import numpy as np
from PIL import Image

HASH_SIDE = 8


def difference_hash(pixels_HWC: np.ndarray) -> str:
    """Return 64 bits as 16 hexadecimal digits: where grey grows from left to right on a 9 x 8 grid.

    Pictures that differ in a few bits look alike: scaled, recompressed or slightly recoloured copies. Computed
    from the prepared picture, which is what training sees. Source: N. Krawetz, "Kind of Like That" (2013), dHash.
    """
    grey = Image.fromarray(pixels_HWC).convert("L").reduce(_reduction(pixels_HWC))
    grid = np.asarray(grey.resize((HASH_SIDE + 1, HASH_SIDE), Image.Resampling.BOX)).astype(np.int16)
    bits = np.packbits(grid[:, 1:] > grid[:, :-1])
    return bits.tobytes().hex()


def _reduction(pixels_HWC: np.ndarray) -> int:
    """Return a whole factor that leaves several pixels a cell: averaging blocks first is much cheaper."""
    return max(1, min(pixels_HWC.shape[:2]) // (4 * (HASH_SIDE + 1)))


def hash_distance(first: str, second: str) -> int:
    """Return in how many of the 64 bits two hashes differ."""
    return (int(first, 16) ^ int(second, 16)).bit_count()
