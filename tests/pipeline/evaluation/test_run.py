"""`evaluate_run` with every metric of pictures: what is painted, compared, written and recorded; and its table."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.config import RunConfig
from pipeline.data.held_out import open_held_out
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation import pictures as pictures_module
from pipeline.evaluation.clip import ClipImages
from pipeline.evaluation.distances import kid, squared_frechet
from pipeline.evaluation.pictures import picture_values
from pipeline.evaluation.report import table
from pipeline.evaluation.run import evaluate_run, result_values
from pipeline.generate import Generator
from pipeline.models.pixels import pixels_from_images
from pipeline.tracking import read_records
from tests.builders import TinyRun, tiny_pictures, tiny_run

METRICS = ["kid", "frechet", "precision_recall", "clip", "memorisation"]
SAMPLE = {"steps": 2, "seed": 3, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return tiny_run(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def run(whole_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> TinyRun:
    whole_run.pretend_checkpoint(monkeypatch)
    monkeypatch.setenv("LDM_QUIET", "1")
    return whole_run


def configured(run: TinyRun, **evaluate: Any) -> RunConfig:
    settings = {"timesteps": 2, "metrics": METRICS} | evaluate
    return run.with_config(evaluate=settings, sample=SAMPLE).config


def painted_features(run: TinyRun, config: RunConfig) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return features of what `Generator` paints for the validation captions and of decoded latents, made apart."""
    generator, held = (
        Generator.load(run.paths, "ema", "cpu"),
        open_held_out(run.config.data, run.paths.latents),
    )
    samples = [held.read(number) for number in range(len(held))]
    captions = [sample.record["captions"][0] for sample in samples]
    painted = generator.paint(captions, seed=config.sample.seed, sample=config.sample)
    means = torch.stack([torch.tensor(sample.arrays["latent"][:4]).float() for sample in samples])
    judge = ClipImages(run.paths.clip, "", torch.device("cpu"))
    return judge(painted), judge(pixels_from_images(generator.autoencoder.decode(means))), captions


def test_every_metric_is_that_of_the_painted_pictures_and_decoded_latents(run: TinyRun) -> None:
    config = configured(run)
    result = evaluate_run(run.paths, config)
    found = result["pictures"]
    painted, real, captions = painted_features(run, config)
    assert found["kid"]["value"] == pytest.approx(kid(painted, real, paired=True)["value"], rel=1e-4)
    assert found["frechet"]["value"] == pytest.approx(
        squared_frechet(painted.astype(np.float64), real.astype(np.float64)), rel=1e-4
    )
    assert (found["painted"], found["captions"], found["weights"]) == (5, len(set(captions)), "ema")
    assert found["reference"] == {"kind": "decoded validation latents", "folder": None, "pictures": 5}
    assert found["features"]["name"] == "the run's own CLIP" and found["features"]["width"] == 32
    assert found["frechet"]["name"] == "Frechet distance in the run's own CLIP (not FID)"
    assert found["frechet"]["low"] is None and "too few" in found["frechet"]["note"]
    assert {"precision", "recall", "neighbours"} == found["precision_recall"].keys()
    assert found["memorisation"]["training_samples"] == 7 and found["memorisation"]["neighbours"] == 7
    assert found["sample"]["seed"] == 3 and found["sample"]["guidance_scale"] == 2.0


def test_all_of_it_is_written_recorded_and_the_same_again(run: TinyRun) -> None:
    config = configured(run)
    result = evaluate_run(run.paths, config)
    assert json.loads(run.paths.evaluation.read_text()) == result == evaluate_run(run.paths, config)
    assert result["settings"]["metrics"] == METRICS and result["kinds"] == ["raw", "ema"]
    record = read_records(run.paths.metrics, "evaluate")[-1]
    values = result_values(result)
    assert {name: record[name] for name in values} == values
    wanted = {"kid_ema", "kid_low_ema", "frechet_ema", "precision_ema", "recall_ema", "memorised_ema"}
    assert wanted | {"clip_score_ema", "clip_score_ceiling_ema", "clip_first_floor_ema"} <= values.keys()
    assert "frechet_low_ema" not in values and not any(name.startswith("fid") for name in values)


def test_without_metrics_nothing_is_painted(run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Generator, "denoise", None)
    assert "pictures" not in evaluate_run(run.paths, configured(run, metrics=[]))


def test_the_piece_of_work_does_not_matter(run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluate_run(run.paths, configured(run))["pictures"]
    monkeypatch.setattr(pictures_module, "PICTURES_AT_ONCE", 2)
    parts = evaluate_run(run.paths, configured(run))["pictures"]
    assert parts["kid"]["value"] == pytest.approx(whole["kid"]["value"], rel=1e-3)
    assert parts["memorisation"]["nearest"][0]["key"] == whole["memorisation"]["nearest"][0]["key"]


def test_a_folder_of_pictures_is_the_reference(run: TinyRun, tmp_path: Path) -> None:
    for number, picture in enumerate(tiny_pictures(7)):
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
    config = configured(run, metrics=["kid", "clip"], reference=str(tmp_path), pictures=4)
    found = evaluate_run(run.paths, config)["pictures"]
    assert found["reference"] == {"kind": "pictures of a folder", "folder": str(tmp_path), "pictures": 7}
    judge = ClipImages(run.paths.clip, "", torch.device("cpu"))
    painted = Generator.load(run.paths, "ema", "cpu")
    held = open_held_out(run.config.data, run.paths.latents)
    captions = [held.read(number * 5 // 4).record["captions"][0] for number in range(4)]
    features = judge(painted.paint(captions, seed=3, sample=config.sample))
    assert found["kid"]["value"] == pytest.approx(kid(features, judge(tiny_pictures(7)))["value"], rel=1e-4)
    assert "memorisation" not in found and "ceiling" in found["clip"]


def test_pictures_are_painted_with_the_weights_of_sample_or_the_first_asked_for(run: TinyRun) -> None:
    config = configured(run, metrics=["kid"])
    assert evaluate_run(run.paths, config, ["raw", "ema"])["pictures"]["weights"] == "ema"
    alone = evaluate_run(run.paths, config, ["raw"])
    assert alone["pictures"]["weights"] == "raw" and "kid_raw" in picture_values(alone["pictures"])


def test_what_is_missing_is_said_before_anything_is_measured(run: TinyRun, tmp_path: Path) -> None:
    for settings in (
        {"features": str(tmp_path)},
        {"clip": str(tmp_path)},
        {"reference": str(tmp_path / "no")},
    ):
        with pytest.raises(ConfigError, match=str(tmp_path)):
            evaluate_run(run.paths, configured(run, **settings))


def test_one_picture_is_no_sample(run: TinyRun) -> None:
    with pytest.raises(ConfigError, match="at least 2 are needed"):
        evaluate_run(run.paths, configured(run, pictures=1))


def test_features_that_are_not_finite_are_no_result(run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ClipImages, "__call__", lambda self, pictures: np.full((len(pictures), 32), np.nan))
    run.paths.evaluation.unlink(missing_ok=True)
    with pytest.raises(DataError, match="not finite"):
        evaluate_run(run.paths, configured(run, metrics=["kid"]))
    assert not run.paths.evaluation.exists()


def test_the_table_says_every_number_and_what_it_is_made_of(run: TinyRun) -> None:
    result = evaluate_run(run.paths, configured(run))
    found, said = result["pictures"], table(result)
    for number in (
        f"{result['ema']['loss']:.4f}",
        f"{found['kid']['value']:.4f}",
        f"{found['frechet']['value']:.2f}",
        f"{found['clip']['floor']['score']['value']:.2f}",
        f"{found['precision_recall']['recall']:.3f}",
        f"{found['memorisation']['painted']['share']:.1%}",
    ):
        assert number in said
    assert "compared with: 5 decoded validation latents" in said and "is not FID" in said
    assert "the run's own CLIP, 32 wide" in said and "captions shuffled" in said
    assert not any(line.startswith("FID") for line in said.splitlines())
    alone = table({key: value for key, value in result.items() if key != "pictures"})
    assert "KID" not in alone and f"{result['raw']['loss']:.4f}" in alone
