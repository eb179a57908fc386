"""The gallery: each picture is what painting with those settings gives, and the folder holds what it says."""

import json

import numpy as np
import pytest
import torch

from pipeline.config import SampleConfig
from pipeline.diffusion.objective import x0_from_prediction
from pipeline.diffusion.samplers import make_sampler, sampling_timesteps, step_back
from pipeline.diffusion.schedule import Schedule
from pipeline.errors import ConfigError
from pipeline.gallery.gallery import guidance_scales, make_gallery
from pipeline.gallery.paintings import X0_TIMES, attention_sheet, guidance_sheet, weights_sheet, x0_sheet
from pipeline.gallery.sheet import LABEL_LINES, Sheet, Strip, Tile, draw_sheet
from pipeline.generate import Generator
from pipeline.sample import LINE_HEIGHT, MARGIN, publish_grid
from pipeline.trained_network import TrainedNetwork
from tests.builders import TinyRun, tiny_pictures, tiny_run

PROMPTS = ["a red square", "a green disc"]
SAMPLE = SampleConfig(steps=3, seed=5, guidance_scale=3.0)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return tiny_run(tmp_path_factory.mktemp("gallery"))


@pytest.fixture
def run(whole_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> TinyRun:
    whole_run.pretend_checkpoint(monkeypatch)
    monkeypatch.setenv("LDM_QUIET", "1")
    return whole_run


@pytest.fixture
def generator(run: TinyRun) -> Generator:
    return Generator.load(run.paths, "ema", "cpu")


def column(sheet: Sheet, label: str) -> np.ndarray:
    return np.stack(
        [tile.picture_HWC for strip in sheet.strips for tile in strip.tiles if tile.label == label]
    )


def test_the_page_its_sheets_and_its_record(run: TinyRun) -> None:
    for step in (2, 5):
        record = {"prompts": PROMPTS, "seed": 5, "weights": "ema"}
        publish_grid(run.paths, step, tiny_pictures(2), record)
    config = run.with_config(sample={"prompts": PROMPTS, "steps": 2, "seed": 5}).config
    page = make_gallery(run.paths, config, prompts_at_most=1, scales=(1.0, 2.5))
    assert page == run.paths.gallery / "step-00000007" / "index.html"
    names = ["learning", "weights", "guidance", "x0", "attention"]
    record = json.loads((page.parent / "gallery.json").read_text())
    assert (record["sheets"], record["prompts"], record["scales"]) == (names, PROMPTS[:1], [1.0, 2.5])
    assert {path.name for path in page.parent.iterdir()} == {
        "index.html",
        "gallery.json",
        *(f"{name}.png" for name in names),
    }
    assert page.read_text().count("<img ") == 5
    kept = [json.loads(line) for line in run.paths.artifacts.read_text().splitlines()]
    assert [entry["name"] for entry in kept] == [f"gallery_{name}" for name in names]
    assert all((run.paths.root / entry["path"]).is_file() and entry["step"] == 7 for entry in kept)
    before = {path.name: path.read_bytes() for path in page.parent.iterdir()}
    make_gallery(run.paths, config, prompts_at_most=1, scales=(1.0, 2.5))
    assert {path.name: path.read_bytes() for path in page.parent.iterdir()} == before


def test_weights_beside_each_other(run: TinyRun, generator: Generator) -> None:
    networks = TrainedNetwork.each(run.paths, ("raw", "ema"), "cpu")
    sheet = weights_sheet((generator.under(trained) for trained in networks), PROMPTS, SAMPLE)
    raw = Generator.load(run.paths, "raw", "cpu").paint(PROMPTS, seed=5, sample=SAMPLE)
    assert np.array_equal(column(sheet, "raw"), raw)
    assert np.array_equal(column(sheet, "ema"), generator.paint(PROMPTS, seed=5, sample=SAMPLE))
    assert not np.array_equal(column(sheet, "raw"), column(sheet, "ema"))


def test_the_sweep_over_guidance(generator: Generator) -> None:
    sheet = guidance_sheet(generator, PROMPTS, SAMPLE, (1.0, 3.0))
    assert np.array_equal(column(sheet, "scale 3"), generator.paint(PROMPTS, seed=5, sample=SAMPLE))
    assert not np.array_equal(column(sheet, "scale 1"), column(sheet, "scale 3"))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "x0"])
def test_the_clean_picture_is_the_one_that_diffusers_implies(run: TinyRun, prediction: str) -> None:
    objective = run.with_config(objective={"prediction": prediction}).config.objective
    sampler = make_sampler("ddim", objective)
    z, predicted = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    one = torch.ones(1)
    for time in sampling_timesteps(sampler, 10):
        theirs = sampler.step(predicted, time, z).pred_original_sample
        alpha, sigma = Schedule.from_config(objective).at(float(time))
        ours = x0_from_prediction(objective.prediction, predicted, z, alpha * one, sigma * one)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_clean_picture_of_a_flow_is_where_its_last_step_ends(run: TinyRun) -> None:
    objective = run.with_config(objective={"prediction": "flow", "flow_shift": 2.0}).config.objective
    sampler = make_sampler("flow_euler", objective)
    z, predicted = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    last = sampling_timesteps(sampler, 4)[-1]
    for time in sampler.timesteps[:-1]:
        step_back(sampler, predicted, time, z, [torch.Generator()])
    ended = step_back(sampler, predicted, last, z, [torch.Generator()])
    alpha, sigma = Schedule.from_config(objective).at(float(last))
    ours = x0_from_prediction("flow", predicted, z, alpha * torch.ones(1), sigma * torch.ones(1))
    # The sampler's times are rounded to whole ones: half a thousandth of a latent of size 4.
    torch.testing.assert_close(ours, ended, rtol=0, atol=4e-3)


def test_eight_times_from_noise_to_picture(generator: Generator) -> None:
    sheet = x0_sheet(generator, PROMPTS, SAMPLE.model_copy(update={"steps": 20}))
    for strip in sheet.strips:
        times = [int(tile.label.removeprefix("t ")) for tile in strip.tiles]
        assert len(times) == X0_TIMES and times == sorted(times, reverse=True)
        assert times[0] > 900 and times[-1] <= 50
    painted = generator.paint(
        PROMPTS, seed=5, sample=SAMPLE.model_copy(update={"steps": 20, "sampler": "ddim"})
    )
    last = np.stack([strip.tiles[-1].picture_HWC for strip in sheet.strips])
    assert np.abs(last.astype(int) - painted).mean() < 1.0, "the way ends at the picture"


def test_a_tile_a_word_beside_the_picture(generator: Generator) -> None:
    sheet = attention_sheet(generator, PROMPTS, SAMPLE)
    painted = generator.paint(PROMPTS, seed=5, sample=SAMPLE)
    for strip, prompt, picture in zip(sheet.strips, PROMPTS, painted, strict=True):
        assert [tile.label.rpartition(" x ")[0] for tile in strip.tiles[1:]] == prompt.split()
        assert np.array_equal(strip.tiles[0].picture_HWC, picture)
        assert all((tile.picture_HWC <= picture).all() for tile in strip.tiles[1:]), "light only takes away"


def test_a_sheet_as_it_is_drawn() -> None:
    pictures = tiny_pictures(3, side=128)
    strips = [
        Strip("a fox", [Tile(pictures[0], "raw"), Tile(pictures[1], "ema")]),
        Strip("an owl", [Tile(pictures[2], "raw")]),
    ]
    drawn = np.asarray(draw_sheet(Sheet("weights", "Weights", "", strips)))
    height = 128 + (1 + LABEL_LINES) * LINE_HEIGHT + MARGIN
    assert drawn.shape == (2 * height + MARGIN, 2 * (128 + MARGIN) + MARGIN, 3)
    for number, (row, across) in enumerate([(0, 0), (0, 1), (1, 0)]):
        top, left = MARGIN + row * height + LINE_HEIGHT, MARGIN + across * (128 + MARGIN)
        assert np.array_equal(drawn[top : top + 128, left : left + 128], pictures[number])


@pytest.mark.parametrize("text", ["", "a", "1,,2", "-1", "nan", "1;2"])
def test_scales_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="--scales"):
        guidance_scales(text)


def test_scales() -> None:
    assert guidance_scales("1,3, 7.5") == (1.0, 3.0, 7.5)
