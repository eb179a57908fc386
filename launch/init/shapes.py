"""Which size, which shape: what the pictures' sides allow, and what a crop would cut away."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from launch.init.pictures import Header
from preprocessing.buckets import Bucket, best_bucket, generated_buckets
from preprocessing.filters import Rules, size_problem

LARGE_ENOUGH = 0.8
"""Share of the pictures whose shorter side should reach image_size, so that few are blown up."""
TOLERATED_CROP = 0.15
"""Mean share of a picture that a square may cut away before buckets are worth their trouble."""
MAX_REJECTED = 0.05
"""Share of the pictures that a proposed filter may cost."""
BUCKET_FILL = 2
"""Global batches that a bucket must hold: `ldm finalize` refuses one that cannot fill a batch."""


@dataclass(frozen=True)
class Shapes:
    """The proposed shapes and what they cost."""

    buckets: tuple[Bucket, ...] | None
    overflow: str
    mean_crop: float
    """Mean share cut away with what is proposed."""
    square_crop: float
    """The same with a square."""
    reason: str


def reaching(headers: Sequence[Header], size: int) -> float:
    """Return the share of the pictures whose shorter side is at least `size` pixels."""
    return sum(header.short >= size for header in headers) / len(headers)


def largest_size(headers: Sequence[Header], sizes: Sequence[int]) -> tuple[int, float]:
    """Return the largest of the ascending `sizes` that most pictures reach, else the smallest, and their share."""
    fitting = [size for size in sizes if reaching(headers, size) >= LARGE_ENOUGH]
    size = fitting[-1] if fitting else sizes[0]
    return size, reaching(headers, size)


def smallest_side(headers: Sequence[Header], image_size: int) -> tuple[int, str]:
    """Return encode.min_side and why: half the size, the size itself where that costs little, or none."""
    for side, blown in (
        (image_size, "no picture is blown up"),
        (image_size // 2, "none is blown up more than twice"),
    ):
        rejected = 1 - reaching(headers, side)
        if rejected <= MAX_REJECTED:
            return side, f"{blown}; rejects {rejected:.1%} of the pictures (too_small)"
    return (
        1,
        f"{1 - reaching(headers, image_size):.0%} are smaller than {image_size} px: they are enlarged, not rejected",
    )


def widest_aspect(headers: Sequence[Header]) -> tuple[float, str]:
    """Return encode.max_aspect and why: the tightest bound that costs few pictures."""
    for bound in (2.0, 3.0, 4.0):
        rejected = sum(header.aspect > bound for header in headers) / len(headers)
        if rejected <= MAX_REJECTED:
            return bound, f"beyond it a crop shows a strip; rejects {rejected:.1%} of the pictures (aspect)"
    return 4.0, f"the default; rejects {rejected:.0%} of the pictures (aspect): many are panoramas or banners"


def rejected_by_size(headers: Sequence[Header], min_side: int, max_aspect: float) -> dict[str, int]:
    """Return how many of the pictures `encode` would reject for their size, by its reasons."""
    rules = Rules(1, (0, 0, 0), min_side, max_aspect, 64_000_000, 1)
    found = Counter(size_problem(header.height, header.width, rules) for header in headers)
    return {reason: count for reason, count in found.items() if reason is not None}


def propose_shapes(
    headers: Sequence[Header], image_size: int, step: int, max_aspect: float, least: float
) -> Shapes:
    """Return a square, or buckets with sides a multiple of `step` that each hold at least the share `least`."""
    kept = [header for header in headers if header.aspect <= max_aspect] or list(headers)
    square = float(np.mean([1 - 1 / header.aspect for header in kept]))
    if square <= TOLERATED_CROP:
        return Shapes(
            None, "reject", square, square, f"a square crop cuts away {square:.0%} on average: little"
        )
    buckets = _filled_buckets(kept, generated_buckets(image_size, step, max_aspect), least)
    if len(buckets) < 2:
        said = f"a square crop cuts away {square:.0%} on average, but no two buckets would fill a batch each"
        return Shapes(None, "reject", square, square, said)
    losses = [best_bucket(header.height, header.width, buckets)[1] for header in kept]
    mean = float(np.mean(losses))
    if mean > square / 2:
        said = (
            f"a square crop cuts away {square:.0%} on average, buckets that fill would still cut {mean:.0%}"
        )
        return Shapes(None, "reject", square, square, said)
    said = f"a square crop would cut away {square:.0%} on average, these {len(buckets)} shapes cut {mean:.0%}"
    return Shapes(tuple(sorted(buckets)), "crop", mean, square, said)


def _filled_buckets(headers: Sequence[Header], buckets: Sequence[Bucket], least: float) -> list[Bucket]:
    """Return the buckets that hold at least the share `least` once the others' pictures have moved to them."""
    left = list(buckets)
    while left:
        held = Counter(best_bucket(header.height, header.width, left)[0] for header in headers)
        smallest = min(left, key=lambda bucket: (held[bucket], bucket))
        if held[smallest] / len(headers) >= least:
            return left
        left = [bucket for bucket in left if held[bucket] and bucket != smallest]
    return left
