"""All terms together: gradients, delayed start, average, resume, collapse, and every latent size."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pipeline.config import AdversarialConfig, RunConfig
from pipeline.errors import ConfigError, DivergedError
from pipeline.first_stage.autoencoder import train_autoencoder
from pipeline.first_stage.autoencoder_trainee import AutoencoderTrainee, collapse_of
from pipeline.first_stage.discriminator import PatchDiscriminator
from pipeline.first_stage.pairs import read_pairs
from pipeline.first_stage.stage import Average, Recipe, checkpoint_folder, open_stage
from pipeline.first_stage.terms import adaptive_weight, hinge_generator_loss
from pipeline.models.autoencoder import FrozenAutoencoder, build_autoencoder
from pipeline.models.pixels import images_from_pixels
from pipeline.paths import RunPaths
from pipeline.tracking import read_records
from tests.pipeline.first_stage.tiny import FULL, FailingPairs, InterruptedTrainingError, Pair

MakeConfig = Callable[..., RunConfig]
MakePaths = Callable[[str], RunPaths]
WEIGHTS = "diffusion_pytorch_model.safetensors"


def trainee_of(config: RunConfig, pairs: list[Pair], paths: RunPaths) -> AutoencoderTrainee:
    """Return a trainee before its first step."""
    assert config.first_stage is not None
    section = config.first_stage.autoencoder
    recipe = Recipe.paced("autoencoder", section, betas=(0.9, 0.99), weight_decay=0.0, clip_grad_norm=1.0)
    torch.manual_seed(0)
    trainee = AutoencoderTrainee(open_stage(config, paths, recipe, {}), section, read_pairs(pairs, 16), None)
    return trainee.with_model(build_autoencoder(section, 16))


def test_adversarial_gradient_is_the_weighted_sum_of_vqgan(
    make_config: MakeConfig, pairs: list[Pair], run_paths: MakePaths
) -> None:
    config = make_config(autoencoder={**FULL, "perceptual": {}, "adversarial": {"weight": 0.7, "width": 8}})
    trainee = trainee_of(config, pairs, run_paths("run"))
    critic = trainee._discriminator
    assert critic is not None
    last = trainee.model.decoder.conv_out.weight
    images = images_from_pixels(torch.stack([torch.from_numpy(pair.image) for pair in pairs[:4]]))
    noise = torch.randn(4, 4, 8, 8)

    def losses() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        decoded, _, _ = trainee._main.wrapped(images, noise)
        return decoded, (decoded - images).abs().mean(), hinge_generator_loss(critic(decoded))

    _, reconstruction, adversarial = losses()
    lengths = [
        torch.autograd.grad(loss, last, retain_graph=True)[0] for loss in (reconstruction, adversarial)
    ]
    ratio = adaptive_weight(*lengths)
    expected = torch.autograd.grad(
        reconstruction + 0.7 * ratio * adversarial, list(trainee.model.parameters())
    )
    decoded, reconstruction, _ = losses()
    slope, found = trainee._adversarial(decoded, reconstruction)
    ours = torch.autograd.grad((decoded * slope).sum(), list(trainee.model.parameters()))
    torch.testing.assert_close(found["adaptive_weight"], ratio)
    for left, right in zip(ours, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is None for parameter in critic.parameters()), (
        "the critic learns in its own step"
    )


def test_the_discriminator_judges_each_picture_alone() -> None:
    torch.manual_seed(0)
    critic = PatchDiscriminator(AdversarialConfig(width=8, layers=2))
    images = torch.randn(4, 3, 16, 16)
    logits = critic(images)
    assert logits.shape == (4, 1, 4, 4)
    torch.testing.assert_close(logits[1:2], critic(images[1:2]))
    torch.testing.assert_close(critic.frozen(images), logits)


def test_terms_of_weight_zero_cost_nothing(
    make_config: MakeConfig, pairs: list[Pair], run_paths: MakePaths
) -> None:
    off = {"gradient_weight": 0.0, "perceptual": {}, "adversarial": {"start": 0}, "ema_decay": 0.0}
    trainee = trainee_of(make_config(autoencoder=off), pairs, run_paths("run"))
    assert set(trainee.step(0, measured=False)) == {"l1", "kl", "loss", "grad_norm"}
    assert set(trainee.parts()) == {"model", "optimizer"}
    on = trainee_of(make_config(autoencoder={**FULL, "perceptual": {}}), pairs, run_paths("other"))
    assert {"adversarial", "discriminator_loss"}.isdisjoint(on.step(3, measured=False))
    assert {"adversarial", "discriminator_loss", "gradient"} <= set(on.step(4, measured=False))


@pytest.mark.parametrize("checkpoint_every", [1, 5])
def test_killed_at_any_checkpoint_equals_straight(
    make_config: MakeConfig, pairs: list[Pair], run_paths: MakePaths, checkpoint_every: int
) -> None:
    config = make_config(autoencoder={**FULL, "checkpoint_every": checkpoint_every})
    straight, killed = run_paths("straight"), run_paths("killed")
    train_autoencoder(config, pairs, straight)
    steps = range(1, 12) if checkpoint_every == 1 else (4, 6, 11)
    seen = set()
    for step in steps:
        folder = checkpoint_folder(killed, "autoencoder")
        done = max((int(path.name[-8:]) for path in folder.glob("step-*")), default=0)
        features = 0 if (killed.root / "features").exists() else 7 * 4
        with pytest.raises(InterruptedTrainingError):
            train_autoencoder(config, FailingPairs(pairs, features + 4 * (step - done) + 1), killed)
        seen |= {path.name for path in folder.glob("step-*")}
    assert len(seen) == (11 if checkpoint_every == 1 else 2)
    train_autoencoder(config, pairs, killed)
    left, right = (load_file(paths.autoencoder / WEIGHTS) for paths in (straight, killed))
    assert all(torch.equal(left[name], right[name]) for name in left)
    reports = [(paths.autoencoder / "first_stage.json").read_text() for paths in (straight, killed)]
    assert reports[0] == reports[1]
    played = [
        [record.get("discriminator_loss") for record in read_records(paths.metrics, "autoencoder")]
        for paths in (straight, killed)
    ]
    assert played[0] == played[1] and played[0][:4] == [None] * 4 and None not in played[0][4:]


def test_a_killed_feature_training_goes_on_to_the_same_bits(
    make_config: MakeConfig, pairs: list[Pair], run_paths: MakePaths
) -> None:
    config = make_config(autoencoder=FULL)
    straight, killed = run_paths("straight"), run_paths("killed")
    train_autoencoder(config, pairs, straight)
    with pytest.raises(InterruptedTrainingError):
        train_autoencoder(config, FailingPairs(pairs, 6 * 4 + 1), killed)
    assert [path.name for path in checkpoint_folder(killed, "features").iterdir()] == ["step-00000005"]
    train_autoencoder(config, pairs, killed)
    left, right = (load_file(paths.root / "features" / "model.safetensors") for paths in (straight, killed))
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_the_published_weights_are_the_average(
    make_config: MakeConfig, pairs: list[Pair], run_paths: MakePaths
) -> None:
    raw, averaged = run_paths("raw"), run_paths("averaged")
    seen: list[dict[str, torch.Tensor]] = []
    update = Average.update

    def watched(average: Average, updates: int) -> None:
        seen.append({name: weight.detach().clone() for name, weight in average._named.items()})
        update(average, updates)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Average, "update", watched)
        train_autoencoder(make_config(autoencoder={"ema_decay": 0.5}), pairs, averaged)
    train_autoencoder(make_config(autoencoder={"ema_decay": 0.0}), pairs, raw)
    published = load_file(averaged.autoencoder / WEIGHTS)
    name = "decoder.conv_in.weight"
    start = build_of(make_config())[name]
    expected = start.clone()
    for updates, weights in enumerate(seen):
        kept = min(0.5, (1 + updates) / (10 + updates))
        expected = kept * expected + (1 - kept) * weights[name]
    torch.testing.assert_close(published[name], expected)
    assert torch.equal(load_file(raw.autoencoder / WEIGHTS)[name], seen[-1][name])
    assert not torch.equal(published[name], seen[-1][name])


def build_of(config: RunConfig) -> dict[str, torch.Tensor]:
    """Return the weights that a training with seed 0 starts from."""
    assert config.first_stage is not None
    torch.manual_seed(0)
    return dict(build_autoencoder(config.first_stage.autoencoder, 16).state_dict())


HEALTHY = {"posterior_std": 0.1, "latent_std": 2.0, "image_std": 0.5, "decoded_std": 0.4}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"posterior_std": 3e-7}, "nothing holds the latents together; raise"),
        ({"posterior_std": 0.999, "latent_std": 0.01}, "posterior is the prior"),
        ({"posterior_std": 0.999, "latent_std": 0.5}, None),
        ({"decoded_std": 0.005}, "decoded to the same colour"),
        ({"decoded_std": 0.0, "image_std": 0.0}, None),
        ({"discriminator_loss": 1e-4}, "discriminator wins outright"),
        ({"discriminator_loss": 0.2}, None),
    ],
)
def test_what_counts_as_collapsed(changes: dict[str, float], said: str | None) -> None:
    found = collapse_of(HEALTHY | changes)
    assert (found is None) if said is None else (found is not None and said in found)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"kl_weight": 1e3, "steps": 120, "learning_rate": 1e-2},
            "the posterior is the prior.*5 records in a row",
        ),
        (
            {
                "steps": 200,
                "learning_rate": 1e-9,
                "adversarial": {"weight": 1e-6, "start": 0, "width": 8, "layers": 2, "learning_rate": 0.02},
            },
            "discriminator wins outright",
        ),
    ],
)
def test_collapse_ends_the_training_with_its_reason(
    make_config: MakeConfig, pairs: list[Pair], run_paths: MakePaths, settings: dict[str, Any], said: str
) -> None:
    paths = run_paths("run")
    with pytest.raises(DivergedError, match=said) as error:
        train_autoencoder(make_config(autoencoder={"precision": "fp32", **settings}), pairs, paths)
    assert error.value.exit_code == 5 and "\n" not in str(error.value) and not paths.autoencoder.exists()


def test_nan_in_the_discriminator_is_named(
    make_config: MakeConfig, pairs: list[Pair], run_paths: MakePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = PatchDiscriminator.forward
    monkeypatch.setattr(PatchDiscriminator, "forward", lambda critic, x: forward(critic, x) * float("nan"))
    config = make_config(autoencoder={**FULL, "perceptual": {}})
    with pytest.raises(DivergedError, match=r"step 5: .*adversarial is nan.*discriminator_loss is nan"):
        train_autoencoder(config, pairs, run_paths("run"))


@pytest.mark.parametrize("channels", [4, 8, 16])
@pytest.mark.parametrize("levels", [3, 4, 5])
def test_every_size_trains_and_loads(
    make_config: MakeConfig, pairs: list[Pair], run_paths: MakePaths, levels: int, channels: int
) -> None:
    sizes = {"block_out_channels": (8,) * levels, "latent_channels": channels, "steps": 2}
    paths = run_paths("run")
    train_autoencoder(make_config(autoencoder=sizes), pairs, paths)
    frozen = FrozenAutoencoder.load(paths.autoencoder)
    assert (frozen.downsampling, frozen.channels) == (2 ** (levels - 1), channels)
    report = json.loads((paths.autoencoder / "first_stage.json").read_text())
    assert len(report["channel_kl_nats"]) == len(report["channel_posterior_std"]) == channels
    assert report["ssim"] <= 1.0 and report["feature_distance"] is None and report["grid_of"] == "validation"
    side = 16 // frozen.downsampling
    assert frozen.encode(torch.zeros(1, 3, 16, 16)).shape == (1, 2 * channels, side, side)


def test_a_start_near_a_linear_map_hands_the_picture_on(make_config: MakeConfig) -> None:
    config = make_config()
    assert config.first_stage is not None
    torch.manual_seed(0)
    model = build_autoencoder(config.first_stage.autoencoder, 16)
    for module in model.modules():
        if hasattr(module, "conv2"):
            assert isinstance(module.conv2, nn.Conv2d) and not bool(module.conv2.weight.any())
    x = torch.randn(1, 8, 8, 8)
    halved = model.encoder.down_blocks[0].downsamplers[0].conv
    deep = torch.nn.functional.pixel_unshuffle(x[:, :2], 2)
    padded = torch.nn.functional.pad(x, (0, 1, 0, 1))
    torch.testing.assert_close(halved(padded) - halved.bias[:, None, None], deep)


def test_crops_that_do_not_fit_are_named(
    make_config: MakeConfig, pairs: list[Pair], run_paths: MakePaths
) -> None:
    with pytest.raises(ConfigError, match=r"crop 32 is more than encode\.image_size 16"):
        train_autoencoder(make_config(autoencoder={"crop": 32}), pairs, run_paths("run"))
    with pytest.raises(ValueError, match="crop 7 is not a multiple of the downsampling 2"):
        make_config(autoencoder={"crop": 7})
