"""SDXL's sizes from what preprocessing recorded."""

import numpy as np
import pytest

from pipeline.data.conditions import require_sizes, time_ids
from pipeline.errors import DataError

RECORD = {"original_height": 40, "original_width": 60, "crop": [4, 10, 20, 40]}


def test_the_corner_is_in_pixels_after_resizing_and_of_the_mirrored_original() -> None:
    """20 x 40 pixels become 10 x 16: the corner (4, 10) lies at (2, 4), mirrored 60 - 10 - 40 = 10 from the left."""
    found = require_sizes(
        time_ids([RECORD, RECORD | {"crop": [4, 0, 20, 40]}], (10, 16), np.array([False, True]))
    )
    assert found.tolist() == [[40, 60, 2, 4, 10, 16], [40, 60, 2, 8, 10, 16]]


@pytest.mark.parametrize("missing", ["crop", "original_height"])
def test_a_data_set_that_records_no_sizes_is_refused(missing: str) -> None:
    record = {name: value for name, value in RECORD.items() if name != missing}
    found = time_ids([record], (8, 8), np.array([False]))
    assert found is None
    with pytest.raises(DataError, match="has no original_height or crop, which"):
        require_sizes(found)
