"""Shapes and crops against a search over everything: no picture loses more than the tolerance, none more than it must."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ConfigError
from preprocessing.buckets import Bucket, best_bucket, crop_box, generated_buckets, lost_share
from preprocessing.filters import Rejection, Rules
from preprocessing.images import Picture, prepare_image
from tests.preprocessing.builders import encode_config, image_file, noise

SHAPES: tuple[Bucket, ...] = ((16, 16), (12, 20), (20, 12), (8, 32))
SIDES = st.integers(1, 400)


def exact_loss(height: int, width: int, bucket: Bucket) -> Fraction:
    """Return the share that is cut away when the picture is scaled until it just covers the bucket."""
    scale = max(Fraction(bucket[0], height), Fraction(bucket[1], width))
    return 1 - Fraction(bucket[0] * bucket[1]) / (height * scale * width * scale)


@given(SIDES, SIDES)
def test_the_bucket_is_the_one_in_which_a_picture_loses_least(height: int, width: int) -> None:
    bucket, loss = best_bucket(height, width, SHAPES)
    least = min(exact_loss(height, width, shape) for shape in SHAPES)
    assert exact_loss(height, width, bucket) == pytest.approx(float(least), abs=1e-12)
    assert loss == pytest.approx(float(least), abs=1e-12)


@given(SIDES, SIDES, st.sampled_from(SHAPES))
def test_the_crop_is_centred_has_the_shape_and_keeps_one_side(
    height: int, width: int, bucket: Bucket
) -> None:
    top, left, kept_height, kept_width = crop_box(height, width, bucket)
    assert 0 < kept_height <= height and 0 < kept_width <= width
    assert kept_height == height or kept_width == width
    assert (top, left) == ((height - kept_height) // 2, (width - kept_width) // 2)
    cut_side, wanted = (
        (kept_height, Fraction(width * bucket[0], bucket[1]))
        if kept_width == width and kept_height != height
        else (kept_width, Fraction(height * bucket[1], bucket[0]))
    )
    assert abs(cut_side - wanted) <= Fraction(1, 2) or cut_side in (1, height, width)
    assert lost_share(height, width, (top, left, kept_height, kept_width)) == pytest.approx(
        1 - kept_height * kept_width / (height * width)
    )


@pytest.mark.parametrize("tolerance", [0.0, 0.05, 0.2])
def test_no_picture_loses_more_than_the_tolerance(tolerance: float) -> None:
    """Counted in the pixels of the crop that the row records, over every size from 5 to 40 in steps."""
    rules = Rules.from_config(
        encode_config(buckets=[list(shape) for shape in SHAPES], bucket_tolerance=tolerance, max_aspect=20)
    )
    kept = rejected = 0
    for height in range(5, 41, 5):
        for width in range(5, 41, 3):
            found = prepare_image(image_file(noise(0, height, width)), rules)
            if isinstance(found, Picture):
                kept += 1
                _, _, kept_height, kept_width = found.crop
                assert height * width - kept_height * kept_width <= tolerance * height * width + 1e-9
                assert found.bucket in SHAPES and "bucket_overflow" not in found.remarks
            else:
                rejected += 1
                assert found == Rejection("bucket")
                least = min(exact_loss(height, width, shape) for shape in SHAPES)
                assert least > tolerance - 0.5 / min(height, width)  # half a pixel of the side that is cut
    assert kept and rejected


@pytest.mark.parametrize(
    ("size", "step", "aspect"), [(512, 64, 2.0), (1024, 64, 4.0), (64, 16, 3.0), (30, 8, 1.5)]
)
def test_generated_shapes_are_all_that_fit_the_area(size: int, step: int, aspect: float) -> None:
    shapes = generated_buckets(size, step, aspect)
    fitting = {
        (height, width)
        for height in range(step, 4 * size + 1, step)
        for width in range(step, 4 * size + 1, step)
        if height * width <= size * size and max(height, width) <= aspect * min(height, width)
    }
    assert set(shapes) <= fitting and shapes == tuple(sorted(set(shapes)))
    for height, width in shapes:  # none can grow in both ways of reading it
        assert (height + step, width) not in fitting or (height, width + step) not in fitting
        assert (width, height) in shapes
    assert size % step or (size, size) in shapes


def test_no_shape_fits() -> None:
    with pytest.raises(ConfigError, match=r"encode.bucket_step 64: no shape within 32 x 32"):
        generated_buckets(32, 64, 2.0)
