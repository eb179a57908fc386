"""The strips that show a prompt's picture come about: only what was painted alike stands side by side."""

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.gallery.learning import MOST_STAGES, learning_sheet, spread
from pipeline.gallery.sheet import Sheet
from pipeline.paths import RunPaths
from pipeline.sample import publish_grid
from tests.builders import tiny_pictures

RECORD: dict[str, Any] = {"prompts": ["a fox", "an owl"], "seed": 5, "guidance_scale": 3.0, "weights": "ema"}


def paint(paths: RunPaths, step: int, **changed: Any) -> np.ndarray:
    pictures = np.roll(tiny_pictures(2), step, axis=1)
    publish_grid(paths, step, pictures, RECORD | changed)
    return pictures


def labels(sheet: Sheet | None) -> list[tuple[str, list[str]]]:
    assert sheet is not None
    return [(strip.prompt, [tile.label for tile in strip.tiles]) for strip in sheet.strips]


def test_a_strip_a_prompt_in_the_order_of_the_steps(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    painted = {step: paint(paths, step) for step in (9, 1000, 4)}
    sheet = learning_sheet(paths, 6)
    assert labels(sheet) == [(prompt, ["step 4", "step 9", "step 1,000"]) for prompt in RECORD["prompts"]]
    assert sheet is not None
    for number, strip in enumerate(sheet.strips):
        for tile, step in zip(strip.tiles, (4, 9, 1000), strict=True):
            assert np.array_equal(tile.picture_HWC, painted[step][number])


def test_other_seeds_prompts_and_settings_are_no_part_of_it(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    for step, changed in enumerate([{"seed": 6}, {"guidance_scale": 2.0}, {"weights": "raw"}, {}, {}]):
        paint(paths, step, **changed)
    paint(paths, 5, prompts=["a fox", "a cat"])
    (paths.samples / "step-00000007.png").write_bytes(b"no record")
    assert labels(learning_sheet(paths, 6)) == [
        ("a fox", ["step 3", "step 4", "step 5"]),
        ("a cat", ["step 5"]),
    ]
    assert len(labels(learning_sheet(paths, 1))) == 1


def test_one_grid_is_no_strip(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    assert learning_sheet(paths, 6) is None
    paint(paths, 4)
    assert learning_sheet(paths, 6) is None


def test_many_are_thinned_out_with_both_ends() -> None:
    assert list(spread(range(100), MOST_STAGES))[:: MOST_STAGES - 1] == [0, 99]
    assert len(set(spread(range(100), MOST_STAGES))) == MOST_STAGES
    assert list(spread([1, 2], 8)) == [1, 2] and list(spread([], 8)) == [] and list(spread([3], 8)) == [3]
