"""Painting: the sampling loop against one written by hand, scaling applied once, and encoders that must belong."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline import publish
from pipeline.config import SampleConfig
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.posterior import scale_latents, split_moments
from pipeline.diffusion.schedule import Schedule
from pipeline.errors import CheckpointError, ConfigError, DataError
from pipeline.export import export_pipeline
from pipeline.generate import Generator
from pipeline.latents.manifest import Manifest
from pipeline.models.pixels import images_from_pixels, pixels_from_images
from pipeline.models.text_encoder import FrozenTextEncoder
from tests.builders import CAPTIONS, TinyRun, tiny_autoencoder, tiny_pictures, tiny_run

DDIM = SampleConfig(sampler="ddim", steps=5, guidance_scale=3.0)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return tiny_run(tmp_path_factory.mktemp("generate"))


@pytest.fixture
def run(whole_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> TinyRun:
    whole_run.pretend_checkpoint(monkeypatch)
    return whole_run


@pytest.fixture
def generator(run: TinyRun) -> Generator:
    return Generator.load(run.paths, "ema", "cpu")


def with_scale(scale: float, sample: SampleConfig = DDIM) -> SampleConfig:
    return sample.model_copy(update={"guidance_scale": scale})


def encoded(generator: Generator, prompts: Sequence[str]) -> Tensor:
    return generator.text_encoder.encode(generator.text_encoder.tokenize(prompts)[0])


def ddim_by_hand(generator: Generator, z: Tensor, text: Tensor, steps: int, scale: float) -> Tensor:
    """DDIM with one forward pass a picture and a half: eq. 12 of Song et al. and eq. 6 of Ho & Salimans, plainly."""
    alpha_bar = Schedule.from_config(generator.trained.config.objective).alphas_cumprod
    times = [1 + k * (1000 // steps) for k in range(steps)][::-1]
    for t, following in zip(times, [*times[1:], 0], strict=True):
        eps = torch.zeros_like(z)
        for b in range(len(z)):
            states = [generator.null_text.text_BLD, text[b : b + 1]]
            with torch.no_grad():
                without, given = (
                    generator.trained.network(z[b : b + 1], torch.tensor([t]), s) for s in states
                )
            eps[b] = ((1 - scale) * without + scale * given)[0]
        x0 = (z - (1 - alpha_bar[t]).sqrt() * eps) / alpha_bar[t].sqrt()
        z = (alpha_bar[following].sqrt() * x0 + (1 - alpha_bar[following]).sqrt() * eps).float()
    return z


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0, 7.5])
def test_the_loop_is_ddim_under_guidance(generator: Generator, scale: float) -> None:
    noise, text = generator.noise(range(3), seed=1), encoded(generator, CAPTIONS[:3])
    ours = generator.denoise(noise, Conditioning(text), with_scale(scale))
    by_hand = ddim_by_hand(generator, noise, text, 5, scale)
    torch.testing.assert_close(ours, by_hand, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("scale", "texts"), [(0.0, 2), (1.0, 2), (1.5, 4), (5.0, 4)])
def test_what_has_no_weight_is_not_computed(generator: Generator, scale: float, texts: int) -> None:
    seen: list[int] = []
    generator.trained.network.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[2])))
    generator.denoise(generator.noise(range(2), 0), generator.text(CAPTIONS[:2]), with_scale(scale))
    assert seen == [texts] * 5


def test_a_picture_does_not_depend_on_its_batch(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = generator.paint(CAPTIONS[:5], seed=3, sample=DDIM)
    alone = [generator.paint([CAPTIONS[k]], seed=3, sample=DDIM, first_picture=k)[0] for k in range(5)]
    monkeypatch.setattr("pipeline.generate.PICTURES_AT_ONCE", 2)
    in_parts = generator.paint(CAPTIONS[:5], seed=3, sample=DDIM)
    assert together.dtype == np.uint8 and together.shape == (5, 16, 16, 3)
    assert np.abs(together.astype(int) - np.stack(alone)).max() <= 1
    assert np.abs(together.astype(int) - in_parts).max() <= 1


def test_equal_calls_paint_equal_bytes_and_others_do_not(generator: Generator) -> None:
    first, again = (generator.paint(CAPTIONS[:2], seed=3, sample=DDIM) for _ in range(2))
    assert np.array_equal(first, again)
    changed = [
        generator.paint(CAPTIONS[:2], seed=4, sample=DDIM),
        generator.paint(CAPTIONS[:2], seed=3, sample=DDIM, first_picture=1),
        generator.paint(CAPTIONS[:2], seed=3, sample=with_scale(1.0)),
        generator.paint(CAPTIONS[2:4], seed=3, sample=DDIM),
        generator.paint(CAPTIONS[:2], seed=3, sample=SampleConfig(steps=5, guidance_scale=3.0)),
    ]
    assert all(np.abs(first.astype(int) - other).max() > 1 for other in changed)


def test_no_prompts_no_pictures(generator: Generator) -> None:
    assert generator.paint([], seed=0, sample=DDIM).shape == (0, 16, 16, 3)


def test_weights_are_the_ones_asked_for(run: TinyRun) -> None:
    for weights in ("raw", "ema"):
        generator = Generator.load(run.paths, weights, "cpu")  # type: ignore[arg-type]
        loaded = generator.trained.network.state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in run.weights[weights].items())
        assert not generator.trained.network.training


# Scaling


class KnowsThePicture(torch.nn.Module):
    """The ideal denoiser of data that is one picture: sampling must end at that picture."""

    def __init__(self, x0_BCHW: Tensor, schedule: Schedule) -> None:
        super().__init__()
        self.x0_BCHW, self.schedule = torch.nn.Parameter(x0_BCHW, requires_grad=False), schedule

    def forward(self, z_BCHW: Tensor, timesteps_B: Tensor, text_BLD: Tensor) -> Tensor:
        alpha, sigma = (part.view(-1, 1, 1, 1) for part in self.schedule.alpha_sigma(timesteps_B))
        return (z_BCHW - alpha * self.x0_BCHW) / sigma


@pytest.mark.parametrize("scaling_factor", [0.5, 2.0])
def test_scaling_is_undone_exactly_once(
    run: TinyRun, generator: Generator, tmp_path: Path, scaling_factor: float
) -> None:
    """Scaling never or twice would decode the picture's latent at another contrast."""
    encoder = type(generator.autoencoder).load(tiny_autoencoder(tmp_path, scaling_factor=scaling_factor))
    mean, _ = split_moments(encoder.encode(images_from_pixels(tiny_pictures(1))), 4)
    expected = pixels_from_images(encoder.decode(mean))
    x0 = scale_latents(mean, encoder.scaling_factor)
    network: Any = KnowsThePicture(x0, Schedule.from_config(run.config.objective))
    painter = Generator(
        dataclasses.replace(generator.trained, network=network), encoder, generator.text_encoder
    )
    painted = painter.paint([CAPTIONS[0]], seed=0, sample=SampleConfig(steps=10, guidance_scale=1.0))
    assert np.abs(painted.astype(int) - expected).max() <= 1
    wrong = pixels_from_images(encoder.decode(x0))
    assert np.abs(wrong.astype(int) - expected).max() > 8, "the test could not tell"


# Refusals


def change_manifest(run: TinyRun, tmp_path: Path, **changes: Any) -> TinyRun:
    """Return the run on a copy of its data set with another manifest, digest made good."""
    folder = tmp_path / "latents"
    folder.mkdir()
    for entry in run.paths.latents.iterdir():
        (folder / entry.name).symlink_to(entry)
    (folder / "manifest.json").unlink()
    manifest = dataclasses.replace(run.manifest, **changes).save(folder)
    changed = run.with_config(data={"dataset": str(folder)})
    return dataclasses.replace(changed, manifest=manifest)


@pytest.mark.parametrize("field", ["autoencoder", "text_encoder", "tokenizer"])
def test_another_encoder_is_refused_by_name_and_both_values(
    run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    encoder = {**run.manifest.encoder, field: "0123abcd"}
    change_manifest(run, tmp_path, encoder=encoder).pretend_checkpoint(monkeypatch)
    with pytest.raises(DataError) as caught:
        Generator.load(run.paths, "ema", "cpu")
    said = str(caught.value)
    assert f"encoder.{field} is '0123abcd' in the data set" in said
    assert repr(run.manifest.encoder[field]) in said


def test_another_scaling_factor_is_refused(
    run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = dataclasses.replace(run.manifest.spec, scaling_factor=0.25)
    change_manifest(run, tmp_path, spec=spec).pretend_checkpoint(monkeypatch)
    with pytest.raises(DataError, match=r"spec\.scaling_factor is 0\.25 in the data set, 0\.5 here"):
        Generator.load(run.paths, "ema", "cpu")


def test_other_data_than_the_training_saw_is_refused(run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    other = dataclasses.replace(run.manifest, digest="f00d")
    dataclasses.replace(run, manifest=other).pretend_checkpoint(monkeypatch)
    with pytest.raises(DataError, match=rf"digest is '{run.manifest.digest}' in the data set, 'f00d' here"):
        Generator.load(run.paths, "ema", "cpu")


def test_the_text_layer_of_the_data_is_painted_with_and_not_exported_as_another(
    run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    penultimate = FrozenTextEncoder.load(run.paths.text_encoder, layer="penultimate")
    changed = change_manifest(
        run, tmp_path, encoder={**run.manifest.encoder, "text_encoder": penultimate.digest}
    )
    encode = run.config.encode.model_copy(update={"text_layer": "penultimate"})
    changed = dataclasses.replace(changed, config=changed.config.model_copy(update={"encode": encode}))
    changed.pretend_checkpoint(monkeypatch)
    # The data set's own null text is still the last layer's: that alone is refused.
    with pytest.raises(DataError, match="null"):
        Generator.load(run.paths, "ema", "cpu")
    monkeypatch.setattr(Generator, "_refuse_other_null_text", lambda *_: None)
    generator = Generator.load(run.paths, "ema", "cpu")
    tokens, _ = penultimate.tokenize(CAPTIONS)
    assert torch.equal(encoded(generator, CAPTIONS), penultimate.encode(tokens))
    with pytest.raises(ConfigError, match="reads the last layer for this model, this run the penultimate"):
        export_pipeline(run.paths, run.config)


def test_another_null_text_is_refused(run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    null = tmp_path / "null"
    changed = change_manifest(run, tmp_path)
    stored = np.load(run.paths.latents / "null" / "text.npy")
    for path in (run.paths.latents / "null").iterdir():
        publish.write_bytes(null / path.name, path.read_bytes())
    np.save(null / "text.npy", stored + np.float16(0.1))
    folder = tmp_path / "latents"
    (folder / "null").unlink()
    (folder / "null").symlink_to(null)
    digests = {**run.manifest.null, "text": publish.file_digest(null / "text.npy")}
    manifest = dataclasses.replace(changed.manifest, null=digests).save(folder)
    dataclasses.replace(changed, manifest=manifest).pretend_checkpoint(monkeypatch)
    with pytest.raises(DataError, match=r"null/text\.npy: differs by 0\.1"):
        Generator.load(run.paths, "ema", "cpu")


def test_a_model_outlives_its_data_set(
    run: TinyRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run.with_config(data={"dataset": "gone"}).pretend_checkpoint(monkeypatch)
    with caplog.at_level(logging.WARNING):
        Generator.load(run.paths, "ema", "cpu")
    assert "gone is not there" in caplog.text


def test_a_data_set_of_tokens_serves_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_run(tmp_path, text="tokens")
    run.pretend_checkpoint(monkeypatch)
    assert Manifest.load(run.paths.latents).spec.text == "tokens"
    painted = Generator.load(run.paths, "ema", "cpu").paint(CAPTIONS[:1], seed=0, sample=DDIM)
    assert painted.std() > 1


def test_weights_of_another_model_are_refused(run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = {name: tensor for name, tensor in run.weights["ema"].items() if name != "conv_in.bias"}
    dataclasses.replace(run, weights={"ema": lacking}).pretend_checkpoint(monkeypatch)
    with pytest.raises(CheckpointError, match=r"step-00000007: its ema weights do not fit .*conv_in\.bias"):
        Generator.load(run.paths, "ema", "cpu")


def test_a_cut_prompt_is_said_aloud(generator: Generator, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        generator.paint(["square " * 40, "a disc"], seed=0, sample=DDIM)
    assert caplog.text.count("prompt cut to 16 tokens") == 1
