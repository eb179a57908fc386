"""Aspect buckets: the shapes that pictures are cropped to, and which one a picture loses least in.

A picture is scaled until it covers its bucket and the rest is cut off evenly, so what it loses is one minus the
ratio of the two aspect ratios. Source of the generated list: the aspect ratio bucketing of NovelAI (2022), as used
by SDXL (Podell et al. 2023, section 2.3): about equal area, sides multiples of a step.
"""

from collections.abc import Sequence

from pipeline.errors import ConfigError

Bucket = tuple[int, int]


def generated_buckets(image_size: int, step: int, max_aspect: float) -> tuple[Bucket, ...]:
    """Return all (height, width) in pixels with sides multiples of `step`, the widest that fit image_size^2.

    Raises:
        ConfigError: when not even one shape fits.
    """
    area = image_size * image_size
    found: set[Bucket] = set()
    for side in range(step, int(image_size * max_aspect**0.5) + 1, step):
        other = area // side // step * step
        if other and max(side, other) <= max_aspect * min(side, other):
            found |= {(side, other), (other, side)}
    if not found:
        raise ConfigError(
            f"encode.bucket_step {step}: no shape within {image_size} x {image_size} pixels has sides that are "
            f"multiples of it and at most {max_aspect:g} to 1; give a smaller step"
        )
    return tuple(sorted(found))


def best_bucket(height: int, width: int, buckets: Sequence[Bucket]) -> tuple[Bucket, float]:
    """Return the bucket in which a picture of this size loses least, and the lost share of its area.

    Ties go to the larger bucket, then to the first in order, so the choice never depends on anything else.
    """
    losses = [(_loss(height, width, bucket), -bucket[0] * bucket[1], bucket) for bucket in buckets]
    loss, _, bucket = min(losses)
    return bucket, loss


def _loss(height: int, width: int, bucket: Bucket) -> float:
    ratio = (height * bucket[1]) / (width * bucket[0])
    return 1.0 - min(ratio, 1.0 / ratio)


def crop_box(height: int, width: int, bucket: Bucket) -> tuple[int, int, int, int]:
    """Return (top, left, height, width) of the centred part that has the bucket's shape, in whole pixels."""
    if height * bucket[1] >= width * bucket[0]:
        kept = max(1, min(height, round(width * bucket[0] / bucket[1])))
        return (height - kept) // 2, 0, kept, width
    kept = max(1, min(width, round(height * bucket[1] / bucket[0])))
    return 0, (width - kept) // 2, height, kept


def lost_share(height: int, width: int, crop: tuple[int, int, int, int]) -> float:
    """Return the share of a picture's area that `crop`, as `crop_box` gives it, leaves out."""
    return 1.0 - crop[2] * crop[3] / (height * width)
