"""The exported folder, read back by stock diffusers, paints what our Generator paints."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from pipeline.config import SampleConfig
from pipeline.diffusion.samplers import SamplerKind
from pipeline.errors import DataError
from pipeline.export import copy_text_encoder, copy_tokenizer, diffusers_unet, export_pipeline
from pipeline.generate import Generator
from pipeline.models.autoencoder import FrozenAutoencoder
from pipeline.models.text_encoder import FrozenTextEncoder
from pipeline.models.unet import UNet
from tests.builders import TinyRun, tiny_run

PROMPTS = [
    "a red square",
    "a green cross",
    "something quite else, and much longer than the text encoder takes",
]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return tiny_run(tmp_path_factory.mktemp("export"))


@pytest.fixture
def run(whole_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> TinyRun:
    whole_run.pretend_checkpoint(monkeypatch)
    return whole_run


def stock_pipeline(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("sampler", "scale"), [("ddim", 3.0), ("ddim", 1.0), ("dpm_solver_2m", 3.0)])
def test_stock_diffusers_paints_the_same_picture(
    run: TinyRun, monkeypatch: pytest.MonkeyPatch, prediction: str, sampler: SamplerKind, scale: float
) -> None:
    trained = run.with_config(objective={"prediction": prediction})
    trained.pretend_checkpoint(monkeypatch)
    sample = SampleConfig(sampler=sampler, steps=6, guidance_scale=scale)
    folder = export_pipeline(run.paths, trained.config.model_copy(update={"sample": sample}))
    generator = Generator.load(run.paths, "ema", "cpu")
    noise = generator.noise(range(len(PROMPTS)), seed=0)
    ours = generator.images(PROMPTS, noise, sample).permute(0, 2, 3, 1).numpy() / 2 + 0.5
    theirs = stock_pipeline(folder)(
        PROMPTS, latents=noise, num_inference_steps=6, guidance_scale=scale, output_type="np"
    ).images
    assert theirs.shape == ours.shape == (3, 16, 16, 3)
    assert np.abs(theirs - ours).max() < 1e-4
    assert theirs.std() > 0.05 and np.mean((theirs <= 0) | (theirs >= 1)) < 0.2, "the pictures could not tell"


def test_the_folder_is_whole_and_says_what_it_is(run: TinyRun) -> None:
    folder = export_pipeline(run.paths, run.config, weights="raw")
    assert folder == run.paths.export
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline" and index["requires_safety_checker"] is False
    assert index["safety_checker"] == index["feature_extractor"] == [None, None]
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["_class_name"], scheduler["steps_offset"]) == ("DPMSolverMultistepScheduler", 1)
    assert (scheduler["beta_schedule"], scheduler["beta_end"]) == ("scaled_linear", 0.012)
    card = (folder / "README.md").read_text()
    for fact in (run.manifest.digest, "| optimizer steps | 7 |", "| weights | raw |", "Licence", "16 x 16"):
        assert fact in card
    assert FrozenAutoencoder.load(folder / "vae").digest == run.manifest.encoder["autoencoder"]
    words = FrozenTextEncoder.load(folder / "text_encoder")
    assert words.digest == run.manifest.encoder["text_encoder"]
    assert words.tokenizer_digest == run.manifest.encoder["tokenizer"]
    unet = stock_pipeline(folder).unet
    for name, tensor in run.weights["raw"].items():
        assert torch.equal(unet.state_dict()[name], tensor)
    assert not [path for path in folder.rglob("*") if path.suffix in {".bin", ".pt", ".pkl", ".py"}]


def test_a_second_export_replaces_the_first_whole(run: TinyRun) -> None:
    (export_pipeline(run.paths, run.config) / "left over").write_text("x")
    folder = export_pipeline(run.paths, run.config)
    assert not (folder / "left over").exists()
    assert [path.name for path in run.paths.root.glob(".*")] == []


def test_a_failed_export_leaves_the_old_one(run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = export_pipeline(run.paths, run.config)
    before = (folder / "README.md").read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("pipeline.export.copy_tokenizer", fail)
    with pytest.raises(OSError, match="disk full"):
        export_pipeline(run.paths, run.config)
    assert (folder / "README.md").read_bytes() == before
    assert [path.name for path in run.paths.root.glob(".*")] == []


def test_an_exported_pipeline_feeds_the_next_run(run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """The vae/ and text_encoder/ folders (tokenizer/ beside it) are encoders of another run."""
    folder = export_pipeline(run.paths, run.config)
    encode = {"autoencoder": str(folder / "vae"), "text_encoder": str(folder / "text_encoder")}
    run.with_config(encode=encode).pretend_checkpoint(monkeypatch)
    Generator.load(run.paths, "ema", "cpu")
    assert (export_pipeline(run.paths, run.config) / "tokenizer" / "vocab.json").is_file()


def test_of_a_whole_clip_only_the_text_tower_goes_over(run: TinyRun, tmp_path: Path) -> None:
    copy_text_encoder(run.paths.clip, tmp_path / "text_encoder")
    copy_tokenizer(run.paths.clip, tmp_path / "tokenizer")
    tower, whole = FrozenTextEncoder.load(tmp_path / "text_encoder"), FrozenTextEncoder.load(run.paths.clip)
    tokens, _ = whole.tokenize(PROMPTS)
    assert torch.equal(tower.tokenize(PROMPTS)[0], tokens)
    assert torch.equal(tower.encode(tokens), whole.encode(tokens))


def test_a_text_encoder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    with pytest.raises(DataError, match=r"no tokenizer\.json or vocab\.json"):
        copy_tokenizer(tmp_path / "text", tmp_path / "out")


def test_a_weight_that_diffusers_does_not_know_is_an_error(run: TinyRun) -> None:
    network = UNet(run.config.model)
    network.register_parameter("stranger", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(RuntimeError, match="stranger"):
        diffusers_unet(network)
