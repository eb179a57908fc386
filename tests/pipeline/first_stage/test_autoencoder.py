"""The autoencoder learns, resumes to the bit, and its measured numbers are those of independent formulas."""

import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from pipeline.config import AutoencoderConfig, RunConfig
from pipeline.errors import CheckpointError, ConfigError, DivergedError
from pipeline.first_stage.autoencoder import train_autoencoder
from pipeline.first_stage.autoencoder_trainee import Reconstruction
from pipeline.first_stage.measure import latent_statistics, reconstruction_quality
from pipeline.first_stage.stage import checkpoint_folder
from pipeline.first_stage.terms import kl_loss, l1_loss
from pipeline.models.autoencoder import FrozenAutoencoder, build_autoencoder
from pipeline.models.pixels import images_from_pixels
from pipeline.paths import RunPaths
from pipeline.tracking import read_records
from tests.pipeline.first_stage.tiny import FailingPairs, InterruptedTrainingError, Pair

MakeConfig = Callable[..., RunConfig]
MakePaths = Callable[[str], RunPaths]
WEIGHTS = "diffusion_pytorch_model.safetensors"


def weights(paths: RunPaths) -> dict[str, torch.Tensor]:
    """Return the trained tensors."""
    return load_file(paths.autoencoder / WEIGHTS)


def assert_equal_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """Compare names and bits."""
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different


def section_of(config: RunConfig) -> AutoencoderConfig:
    """Return the autoencoder's part of a config that has one."""
    assert config.first_stage is not None
    return config.first_stage.autoencoder


def interrupt(config: RunConfig, pairs: list[Pair], paths: RunPaths, step: int) -> None:
    """Train until the process dies inside `step` (from 0)."""
    batch = section_of(config).batch
    with pytest.raises(InterruptedTrainingError):
        train_autoencoder(config, FailingPairs(pairs, step * batch + 1), paths)
    assert not paths.autoencoder.exists()


def test_loss_falls_and_records_are_complete(
    make_config: MakeConfig, pairs: list[Pair], run_paths: MakePaths
) -> None:
    paths = run_paths("run")
    train_autoencoder(make_config(autoencoder={"steps": 60}), pairs, paths)
    report = json.loads((paths.autoencoder / "first_stage.json").read_text())
    assert report["last_loss"] < 0.5 * report["first_loss"]
    records = read_records(paths.metrics, "autoencoder")
    assert [record["step"] for record in records] == list(range(1, 61))
    assert records[-1]["samples"] == 240
    assert records[0]["loss"] == report["first_loss"] and records[-1]["loss"] == report["last_loss"]
    assert records[0]["loss"] == pytest.approx(records[0]["l1"] + 1e-6 * records[0]["kl"], rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_killed_and_resumed_equals_straight(
    make_config: MakeConfig, pairs: list[Pair], run_paths: MakePaths, precision: str
) -> None:
    config = make_config(autoencoder={"precision": precision})
    straight, killed = run_paths("straight"), run_paths("killed")
    train_autoencoder(config, pairs, straight)
    interrupt(config, pairs, killed, step=3)
    interrupt(config, pairs, killed, step=8)
    interrupt(config, pairs, killed, step=6)
    assert [path.name for path in sorted(checkpoint_folder(killed, "autoencoder").iterdir())] == [
        "step-00000005",
        "step-00000010",
    ]
    train_autoencoder(config, pairs, killed)
    assert_equal_bits(weights(straight), weights(killed))
    assert (straight.autoencoder / "first_stage.json").read_text() == (
        killed.autoencoder / "first_stage.json"
    ).read_text()
    assert [record["loss"] for record in read_records(killed.metrics, "autoencoder")] == [
        record["loss"] for record in read_records(straight.metrics, "autoencoder")
    ]


def test_damaged_newest_checkpoint_falls_back_and_says_so(
    make_config: MakeConfig,
    pairs: list[Pair],
    run_paths: MakePaths,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = make_config()
    straight, damaged = run_paths("straight"), run_paths("damaged")
    train_autoencoder(config, pairs, straight)
    interrupt(config, pairs, damaged, step=11)
    newest = checkpoint_folder(damaged, "autoencoder") / "step-00000010"
    payload = bytearray((newest / "optimizer.safetensors").read_bytes())
    payload[-1] ^= 1
    (newest / "optimizer.safetensors").write_bytes(payload)
    with caplog.at_level(logging.WARNING):
        train_autoencoder(config, pairs, damaged)
    assert "step-00000010" in caplog.text and "optimizer.safetensors has another sha256" in caplog.text
    assert_equal_bits(weights(straight), weights(damaged))


def test_no_whole_checkpoint_is_an_error(
    make_config: MakeConfig, pairs: list[Pair], run_paths: MakePaths
) -> None:
    config, paths = make_config(), run_paths("run")
    interrupt(config, pairs, paths, step=6)
    folder = checkpoint_folder(paths, "autoencoder")
    (folder / "step-00000005" / "checkpoint.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"checkpoint\.json is missing.*remove .*first_stage/autoencoder"
    ):
        train_autoencoder(config, pairs, paths)


def test_a_finished_folder_returns_at_once(
    make_config: MakeConfig, pairs: list[Pair], run_paths: MakePaths
) -> None:
    config, paths = make_config(), run_paths("run")
    assert train_autoencoder(config, pairs, paths) == paths.autoencoder
    assert not checkpoint_folder(paths, "autoencoder").exists()
    written = (paths.autoencoder / WEIGHTS).stat().st_mtime_ns
    train_autoencoder(config, FailingPairs(pairs, 0), paths)
    assert (paths.autoencoder / WEIGHTS).stat().st_mtime_ns == written


def test_other_settings_or_pictures_are_refused_by_name(
    make_config: MakeConfig, pairs: list[Pair], run_paths: MakePaths
) -> None:
    paths = run_paths("run")
    interrupt(make_config(), pairs, paths, step=6)
    with pytest.raises(ConfigError, match=r"learning_rate = 0\.003, this run has 0\.001"):
        train_autoencoder(make_config(autoencoder={"learning_rate": 1e-3}), pairs, paths)
    train_autoencoder(make_config(), pairs, paths)
    train_autoencoder(make_config(autoencoder={"log_every": 7, "checkpoint_every": 3}), pairs, paths)
    with pytest.raises(ConfigError, match="seed = 0, this run has 1"):
        train_autoencoder(make_config(seed=1), pairs, paths)
    changed = [Pair(255 - pair.image, pair.caption, pair.key, pair.split) for pair in pairs]
    with pytest.raises(ConfigError, match="trained with pairs = "):
        train_autoencoder(make_config(), changed, paths)


def test_a_foreign_folder_is_not_overwritten(
    make_config: MakeConfig, pairs: list[Pair], run_paths: MakePaths
) -> None:
    paths = run_paths("run")
    paths.autoencoder.mkdir(parents=True)
    (paths.autoencoder / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"has no first_stage\.json"):
        train_autoencoder(make_config(), pairs, paths)
    assert (paths.autoencoder / "config.json").read_text() == "{}"


def test_divergence_is_named_and_never_saved(
    make_config: MakeConfig, pairs: list[Pair], run_paths: MakePaths
) -> None:
    paths = run_paths("run")
    config = make_config(
        autoencoder={
            "learning_rate": 1e30,
            "clip_grad_norm": 1e30,
            "precision": "fp32",
            "checkpoint_every": 1,
        }
    )
    with pytest.raises(DivergedError, match=r"lower first_stage\.autoencoder\.learning_rate"):
        train_autoencoder(config, pairs, paths)
    for path in checkpoint_folder(paths, "autoencoder").glob("step-*"):
        assert json.loads((path / "checkpoint.json").read_text())["noted"]["last_loss"] < float("inf")


def test_the_seed_and_the_order_of_the_pairs(
    make_config: MakeConfig, pairs: list[Pair], run_paths: MakePaths
) -> None:
    config = make_config(autoencoder={"steps": 3})
    first, reordered, other = run_paths("first"), run_paths("reordered"), run_paths("other")
    train_autoencoder(config, pairs, first)
    train_autoencoder(config, pairs[::-1], reordered)
    assert_equal_bits(weights(first), weights(reordered))
    train_autoencoder(make_config(seed=1, autoencoder={"steps": 3}), pairs, other)
    assert not torch.equal(weights(first)["encoder.conv_in.weight"], weights(other)["encoder.conv_in.weight"])


def test_an_epoch_shows_every_picture_once_flipped_or_not_under_fresh_noise(
    make_config: MakeConfig, pairs: list[Pair], run_paths: MakePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    forward = Reconstruction.forward

    def watched(
        network: Reconstruction, images: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        seen.append((images, noise))
        return forward(network, images, noise)

    monkeypatch.setattr(Reconstruction, "forward", watched)
    train_autoencoder(make_config(autoencoder={"steps": 8}), pairs, run_paths("run"))
    pixels = (torch.cat([images for images, _ in seen]) + 1.0).mul(127.5).round().permute(0, 2, 3, 1)
    flips = Counter[str]()
    left = {pair.key: torch.from_numpy(pair.image).float() for pair in pairs if pair.split == "train"}
    for picture in pixels:
        key, flipped = next(
            (key, flipped)
            for key, image in left.items()
            for flipped in (False, True)
            if torch.equal(picture, image.flip(1) if flipped else image)
        )
        symmetric = torch.equal(left[key], left[key].flip(1))
        flips["symmetric" if symmetric else "flipped" if flipped else "plain"] += 1
        del left[key]
    assert not left and min(flips["flipped"], flips["plain"]) >= 2
    noise = torch.cat([noise.flatten(1) for _, noise in seen])
    assert noise.shape == (32, 4 * 8 * 8)
    assert float(noise.mean()) == pytest.approx(0.0, abs=0.05) and float(noise.std()) == pytest.approx(
        1.0, abs=0.05
    )
    assert float((noise @ noise.T / 256.0 - torch.eye(32)).abs().max()) < 0.4, "noise was used twice"


def test_terms_equal_diffusers_own(make_config: MakeConfig, pairs: list[Pair]) -> None:
    section = section_of(make_config(autoencoder={"precision": "fp32"}))
    torch.manual_seed(0)
    model = build_autoencoder(section, 16)
    images = images_from_pixels(np.stack([pair.image for pair in pairs[:4]]))
    noise = torch.randn(4, 4, 8, 8)
    decoded, mean, logvar = Reconstruction(model, "fp32")(images, noise)
    posterior = model.encode(images).latent_dist
    expected = model.decode(posterior.mean + posterior.std * noise).sample
    torch.testing.assert_close(decoded, expected)
    torch.testing.assert_close(l1_loss(decoded, images), torch.nn.functional.l1_loss(expected, images))
    expected_kl = posterior.kl().sum() / images.numel()
    torch.testing.assert_close(kl_loss(mean, logvar, images.numel()), expected_kl)


def test_scaling_factor_is_one_over_the_std_of_drawn_latents(
    make_config: MakeConfig, pairs: list[Pair], run_paths: MakePaths
) -> None:
    paths = run_paths("run")
    train_autoencoder(make_config(autoencoder={"kl_weight": 3.0}), pairs, paths)
    frozen = FrozenAutoencoder.load(paths.autoencoder)
    report = json.loads((paths.autoencoder / "first_stage.json").read_text())
    model = AutoencoderKL.from_pretrained(paths.autoencoder)
    images = images_from_pixels(np.stack([pair.image for pair in pairs if pair.split == "train"]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        posterior = model.encode(images).latent_dist
        drawn = torch.stack([posterior.sample(generator) for _ in range(50)]).double()
    assert float(posterior.std.mean()) > 0.1, "the posterior's own spread must matter for this test"
    assert frozen.scaling_factor == report["scaling_factor"] == model.config.scaling_factor
    assert report["scaling_factor"] == pytest.approx(1.0 / float(drawn.std()), rel=5e-3)
    assert report["channel_mean"] == pytest.approx(drawn.mean(dim=(0, 1, 3, 4)).tolist(), abs=2e-2)
    assert report["channel_std"] == pytest.approx([float(drawn[:, :, c].std()) for c in range(4)], rel=1e-2)
    assert report["measured_images"] == 32 and report["digest"] == frozen.digest


def test_psnr_is_that_of_uint8_pictures(
    make_config: MakeConfig, pairs: list[Pair], run_paths: MakePaths
) -> None:
    paths = run_paths("run")
    train_autoencoder(make_config(autoencoder={"steps": 20}), pairs, paths)
    report = json.loads((paths.autoencoder / "first_stage.json").read_text())
    frozen = FrozenAutoencoder.load(paths.autoencoder)
    held_out = np.stack([pair.image for pair in pairs if pair.split == "validation"])
    decoded = frozen.decode(frozen.encode(images_from_pixels(held_out))[:, :4])
    painted = (decoded.permute(0, 2, 3, 1).double().numpy() + 1.0) * 127.5
    errors = np.mean((painted - held_out) ** 2, axis=(1, 2, 3))
    assert report["psnr_db"] == pytest.approx(float(np.mean(10.0 * np.log10(255.0**2 / errors))), abs=1e-3)
    assert report["validation_images"] == 8


def test_statistics_need_no_particular_batching(make_config: MakeConfig, pairs: list[Pair]) -> None:
    torch.manual_seed(0)
    model = build_autoencoder(section_of(make_config()), 16).eval()
    images = images_from_pixels(np.stack([pair.image for pair in pairs]))
    whole = latent_statistics(model, iter([images]))
    split = latent_statistics(model, iter(images.split(7)))
    assert whole.images == split.images == 40
    assert whole.scaling_factor == pytest.approx(split.scaling_factor, rel=1e-6)
    assert reconstruction_quality(model, iter([])).psnr_db is None


def test_no_first_stage_and_sizes_that_do_not_fit(
    make_config: MakeConfig, pairs: list[Pair], run_paths: MakePaths
) -> None:
    paths = run_paths("run")
    with pytest.raises(ConfigError, match="nothing to train"):
        train_autoencoder(make_config().model_copy(update={"first_stage": None}), pairs, paths)
    with pytest.raises(ConfigError, match=r"image_size 16 is not a multiple of 32"):
        config = make_config(autoencoder={"block_out_channels": (8, 8, 8, 8, 8, 8)})
        train_autoencoder(config, pairs, paths)


def test_leftovers_of_a_kill_while_publishing_are_removed(
    make_config: MakeConfig, pairs: list[Pair], run_paths: MakePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, straight, killed = make_config(), run_paths("straight"), run_paths("killed")
    train_autoencoder(config, pairs, straight)

    def dies(*_: object) -> None:
        raise InterruptedTrainingError

    with monkeypatch.context() as patched:
        patched.setattr("pipeline.first_stage.autoencoder.save_autoencoder", dies)
        with pytest.raises(InterruptedTrainingError):
            train_autoencoder(config, pairs, killed)
    leftover = killed.root / ".autoencoder.tmp-1-0000"
    shutil.copytree(straight.autoencoder, leftover)
    train_autoencoder(config, pairs, killed)
    assert not leftover.exists() and not checkpoint_folder(killed, "autoencoder").exists()
    assert_equal_bits(weights(straight), weights(killed))


def test_nothing_but_whole_names_in_the_run_folder(
    make_config: MakeConfig, pairs: list[Pair], run_paths: MakePaths
) -> None:
    paths = run_paths("run")
    train_autoencoder(make_config(), pairs, paths)
    files = {path.name for path in paths.autoencoder.iterdir()}
    assert files == {"config.json", WEIGHTS, "first_stage.json", "reconstruction.png"}
    assert not list(Path(paths.root).rglob(".*"))
