"""The sample grid: what is on it, what is said beside it, and that it is the same every time."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont

from pipeline.errors import ConfigError
from pipeline.generate import Generator
from pipeline.sample import MARGIN, Cell, draw_grid, sample_grid, wrapped
from tests.builders import CAPTIONS, TinyRun, tiny_pictures, tiny_run

PROMPTS = {"prompts": ["a red square", "a blue whale", "a green disc"], "steps": 3, "seed": 5}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return tiny_run(tmp_path_factory.mktemp("sample"))


@pytest.fixture
def run(whole_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> TinyRun:
    whole_run.pretend_checkpoint(monkeypatch)
    monkeypatch.setenv("LDM_QUIET", "1")
    return whole_run


def files_below(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")}


def test_a_grid_with_its_pictures_and_its_record(run: TinyRun) -> None:
    config = run.with_config(sample=PROMPTS).config
    grid = sample_grid(run.paths, config)
    assert grid == run.paths.samples / "step-00000007.png"
    said = json.loads(grid.with_suffix(".json").read_text())
    assert said["prompts"] == PROMPTS["prompts"] and said["truncated"] == [False] * 3
    assert (said["seed"], said["steps"], said["guidance_scale"]) == (5, 3, 5.0)
    assert (said["checkpoint"], said["step"], said["weights"]) == ("step-00000007", 7, "ema")
    assert said["data_digest"] == run.manifest.digest
    assert said["autoencoder"] == run.manifest.encoder["autoencoder"]
    painted = Generator.load(run.paths, "ema", "cpu").paint(
        config.sample.prompts, seed=5, sample=config.sample
    )
    singles = [
        np.asarray(Image.open(path)) for path in sorted((run.paths.samples / "step-00000007").iterdir())
    ]
    assert np.array_equal(np.stack(singles), painted)
    shown = np.asarray(Image.open(grid))
    enlarged = painted[2].repeat(8, axis=0).repeat(8, axis=1)
    top = MARGIN + Cell(16, 16).step_y
    assert np.array_equal(shown[top : top + 128, MARGIN : MARGIN + 128], enlarged)
    record = json.loads(run.paths.metrics.read_text().splitlines()[-1])
    assert (record["kind"], record["step"], record["samples"], record["pictures"]) == ("sample", 7, 28, 3)


def test_the_same_run_gives_the_same_bytes(run: TinyRun) -> None:
    config = run.with_config(sample=PROMPTS).config
    sample_grid(run.paths, config)
    first = files_below(run.paths.samples)
    sample_grid(run.paths, config)
    assert files_below(run.paths.samples) == first and len(first) == 5


def test_without_prompts_captions_from_all_over_the_validation_split_are_painted(run: TinyRun) -> None:
    grid = sample_grid(run.paths, run.with_config(sample={"steps": 2, "num_prompts": 3}).config)
    # Samples 7 to 11 are the validation split; three spread over it.
    expected = [CAPTIONS[k % len(CAPTIONS)] for k in (7, 8, 10)]
    assert json.loads(grid.with_suffix(".json").read_text())["prompts"] == expected


def test_without_prompts_and_captions_there_is_nothing_to_paint(
    run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = run.with_config(data={"dataset": "gone"})
    gone.pretend_checkpoint(monkeypatch)
    with pytest.raises(ConfigError, match=r"sample\.prompts: empty"):
        sample_grid(run.paths, gone.config)


def test_captions_stand_under_their_pictures() -> None:
    pictures = tiny_pictures(2, side=128)
    blank = np.asarray(draw_grid(pictures, ["", ""]))
    written = np.asarray(draw_grid(pictures, ["", "a red square"]))
    changed = np.argwhere((blank != written).any(axis=2))
    (top, left), (bottom, right) = changed.min(axis=0), changed.max(axis=0)
    assert top >= MARGIN + 128 and bottom < MARGIN + Cell(128, 128).step_y - MARGIN
    assert left >= 2 * MARGIN + 128 and right < 2 * MARGIN + 256


def test_long_captions_are_cut_to_three_lines_that_fit() -> None:
    font = ImageFont.load_default(12)
    for caption in ("word " * 60, "w" * 300, "a " + "w" * 300 + " b c d", "short", ""):
        lines = wrapped(caption, 128, font)
        assert len(lines) <= 3 and all(font.getlength(line) <= 128 for line in lines)
    assert wrapped("word " * 60, 128, font)[-1].endswith("...")
    assert wrapped("a red square", 128, font) == ["a red square"]
