"""A folder of real pictures: each cut to the painted shape, and what is no picture is named."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import ConfigError, DataError
from pipeline.evaluation.references import reference_files, reference_pictures
from tests.builders import tiny_pictures


def test_pictures_of_the_right_shape_are_taken_as_they_are_in_the_order_of_names(tmp_path: Path) -> None:
    pictures = tiny_pictures(3)
    (tmp_path / "below").mkdir()
    for name, picture in zip(("b.png", "a.png", "below/c.PNG"), pictures, strict=True):
        Image.fromarray(picture).save(tmp_path / name, format="PNG")
    (tmp_path / "notes.txt").write_text("no picture")
    files = reference_files(tmp_path)
    assert [path.name for path in files] == ["a.png", "b.png", "c.PNG"]
    assert np.array_equal(reference_pictures(files, 16, 16), pictures[[1, 0, 2]])


def test_others_are_cut_in_the_middle_and_resized(tmp_path: Path) -> None:
    """Three stripes side by side, each a square: the middle one is what is seen."""
    stripes = np.zeros((32, 96, 3), np.uint8)
    for number in range(3):
        stripes[:, 32 * number : 32 * (number + 1), number] = 200
    Image.fromarray(stripes).save(tmp_path / "wide.png")
    (found,) = reference_pictures([tmp_path / "wide.png"], 8, 8)
    assert found.shape == (8, 8, 3)
    assert np.abs(found.astype(int) - [0, 200, 0]).max() <= 16  # The filter looks a little beyond the edge.


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    assert (reference_pictures([tmp_path / "clear.png"], 4, 4) == 255).all()


def test_what_cannot_be_taken_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a folder"):
        reference_files(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="holds 0 pictures"):
        reference_files(tmp_path)
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 no more")
    with pytest.raises(DataError, match=r"broken\.jpg: not a readable picture"):
        reference_pictures([tmp_path / "broken.jpg"], 8, 8)
