"""Validation loss: known answers of known networks, fixed noise, and no trace of the batch size."""

import dataclasses
import json
import math
import uuid
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline import trained_network
from pipeline.config import ObjectiveConfig
from pipeline.data.changes import data_digest
from pipeline.data.held_out import HeldOut
from pipeline.data.sets import open_datasets
from pipeline.diffusion.posterior import scale_latents, split_moments
from pipeline.diffusion.schedule import Schedule
from pipeline.errors import DataError, DivergedError
from pipeline.evaluation.losses import Evaluator, evaluation_timesteps, summary, validation_noise
from pipeline.evaluation.run import evaluate_run
from pipeline.generate import Generator
from pipeline.latents.reader import LatentDataset
from pipeline.models.text_encoder import FrozenTextEncoder
from pipeline.progress import Progress
from pipeline.sample import chosen_prompts
from pipeline.tracking import read_records
from pipeline.trained_network import TrainedNetwork
from tests.builders import TinyRun, tiny_dataset, tiny_run

TIMESTEPS = [62, 500, 937]
SHAPE = (4, 8, 8)
OBJECTIVE = ObjectiveConfig()


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return tiny_run(tmp_path_factory.mktemp("evaluate"))


@pytest.fixture
def run(whole_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> TinyRun:
    whole_run.pretend_checkpoint(monkeypatch)
    monkeypatch.setenv("LDM_QUIET", "1")
    return whole_run


@pytest.fixture
def trained(run: TinyRun) -> TrainedNetwork:
    return TrainedNetwork.newest(run.paths, "ema", "cpu")


def losses(trained: TrainedNetwork, dataset: LatentDataset, batch: int = 64, **text: Any) -> np.ndarray:
    evaluator = Evaluator.of(trained, HeldOut([dataset]), text.get("encoder"))
    return evaluator.losses(len(dataset), TIMESTEPS, batch, Progress(0))


def latents(dataset: LatentDataset) -> Tensor:
    """Return the scaled posterior means of the split, worked out apart from the code under test."""
    moments = torch.stack([torch.tensor(dataset.read(k).arrays["latent"]) for k in range(len(dataset))])
    mean, _ = split_moments(moments, 4)
    return scale_latents(mean, dataset.spec.scaling_factor, dataset.spec.shift_factor)


class Answers(torch.nn.Module):
    """A network with a known loss: it knows the clean latents and is `off` by a constant."""

    def __init__(self, x0_BCHW: Tensor, prediction: str, off: float) -> None:
        super().__init__()
        self.x0_BCHW, self.schedule = torch.nn.Parameter(x0_BCHW, False), Schedule.from_config(OBJECTIVE)
        self.prediction, self.off = prediction, off

    def forward(self, z_BCHW: Tensor, timesteps_B: Tensor, text_BLD: Tensor) -> Tensor:
        alpha, sigma = (part.view(-1, 1, 1, 1) for part in self.schedule.alpha_sigma(timesteps_B))
        noise = (z_BCHW - alpha * self.x0_BCHW) / sigma
        answer = noise if self.prediction == "epsilon" else alpha * noise - sigma * self.x0_BCHW
        return answer + self.off


class Nothing(torch.nn.Module):
    """A network whose answer is always zero."""

    def __init__(self) -> None:
        super().__init__()
        self.zero = torch.nn.Parameter(torch.zeros(1), False)

    def forward(self, z_BCHW: Tensor, timesteps_B: Tensor, text_BLD: Tensor) -> Tensor:
        return self.zero * z_BCHW


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("off", [0.0, 0.25])
def test_a_network_that_is_off_by_a_constant_has_its_square_as_loss(
    run: TinyRun, trained: TrainedNetwork, prediction: str, off: float
) -> None:
    """Only true for latents scaled once and the target of this objective."""
    dataset = LatentDataset(run.paths.latents, "validation")
    objective = OBJECTIVE.model_copy(update={"prediction": prediction})
    network: Any = Answers(latents(dataset), prediction, off)
    config = trained.config.model_copy(update={"objective": objective})
    known = dataclasses.replace(trained, network=network, config=config)
    assert losses(known, dataset) == pytest.approx(np.full((5, 3), off**2), abs=1e-5)


def test_a_network_that_says_nothing_has_the_noise_as_loss(run: TinyRun, trained: TrainedNetwork) -> None:
    network: Any = Nothing()
    dataset = LatentDataset(run.paths.latents, "validation")
    expected = [
        [
            np.square(validation_noise(dataset.read(k).key, t, SHAPE), dtype=np.float64).mean()
            for t in TIMESTEPS
        ]
        for k in range(5)
    ]
    found = losses(dataclasses.replace(trained, network=network), dataset)
    assert found == pytest.approx(np.array(expected), rel=1e-5)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_the_batch_size_does_not_matter(run: TinyRun, trained: TrainedNetwork, batch: int) -> None:
    dataset = LatentDataset(run.paths.latents, "validation")
    np.testing.assert_allclose(losses(trained, dataset, batch), losses(trained, dataset), rtol=1e-5)


def test_noise_follows_from_key_and_timestep_alone() -> None:
    noise = validation_noise("00001", 62, SHAPE)
    assert np.array_equal(noise, validation_noise("00001", 62, SHAPE))
    others = [validation_noise("00002", 62, SHAPE), validation_noise("00001", 63, SHAPE)]
    assert all(abs(np.corrcoef(noise.ravel(), other.ravel())[0, 1]) < 0.25 for other in others)
    many = np.stack([validation_noise(str(k), k, SHAPE) for k in range(200)])
    assert many.mean() == pytest.approx(0, abs=0.02) and many.std() == pytest.approx(1, abs=0.02)


def test_tokens_and_embeddings_give_the_same_losses(
    run: TinyRun, trained: TrainedNetwork, tmp_path: Path
) -> None:
    tiny_dataset(tmp_path / "tokens", run.paths.autoencoder, run.paths.text_encoder, text="tokens")
    encoder = FrozenTextEncoder.load(run.paths.text_encoder)
    with_tokens = losses(trained, LatentDataset(tmp_path / "tokens", "validation"), encoder=encoder)
    with_states = losses(trained, LatentDataset(run.paths.latents, "validation"))
    np.testing.assert_allclose(with_tokens, with_states, rtol=2e-3)
    assert not np.array_equal(with_tokens, with_states)  # fp16 rounding of the states: they were really used


def test_evaluation_of_a_run(run: TinyRun) -> None:
    config = run.with_config(evaluate={"timesteps": 4, "batch": 2, "max_samples": 3}).config
    result = evaluate_run(run.paths, config)
    assert json.loads(run.paths.evaluation.read_text()) == result
    assert result["timesteps"] == [125, 375, 625, 875]
    assert (result["step"], result["samples"], result["validation_samples"]) == (7, 28, 3)
    assert (result["checkpoint"], result["data_digest"]) == ("step-00000007", run.manifest.digest)
    dataset = LatentDataset(run.paths.latents, "validation")
    for weights in ("raw", "ema"):
        trained = TrainedNetwork.newest(run.paths, weights, "cpu")  # type: ignore[arg-type]
        expected = Evaluator.of(trained, HeldOut([dataset]), None).losses(
            3, result["timesteps"], 64, Progress(0)
        )
        assert result[weights]["loss"] == pytest.approx(expected.mean(), rel=1e-5)
        assert result[weights]["loss_by_timestep"] == pytest.approx(expected.mean(axis=0), rel=1e-5)
    assert result["raw"]["loss"] != result["ema"]["loss"]
    (record,) = read_records(run.paths.metrics, "evaluate")
    assert record["val_loss_ema"] == result["ema"]["loss"]
    assert record["val_loss_raw/t0375"] == result["raw"]["loss_by_timestep"][1]


def test_a_second_evaluation_is_the_same(run: TinyRun) -> None:
    config = run.with_config(evaluate={"timesteps": 2}).config
    first = evaluate_run(run.paths, config)
    assert evaluate_run(run.paths, config) == first


def test_other_data_than_the_training_saw_is_refused(run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    other = dataclasses.replace(run.manifest, digest="f00d")
    dataclasses.replace(run, manifest=other).pretend_checkpoint(monkeypatch)
    with pytest.raises(DataError, match=rf"digest is '{run.manifest.digest}' in the data set, 'f00d' here"):
        evaluate_run(run.paths, run.config)


def test_an_empty_validation_split_is_refused(
    run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "latents"
    manifest = tiny_dataset(folder, run.paths.autoencoder, run.paths.text_encoder, validation=0)
    empty = dataclasses.replace(run.with_config(data={"dataset": str(folder)}), manifest=manifest)
    empty.pretend_checkpoint(monkeypatch)
    with pytest.raises(DataError, match="the validation split is empty"):
        evaluate_run(run.paths, empty.config)


def test_losses_that_are_not_finite_are_no_result(run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run.paths.evaluation.unlink(missing_ok=True)
    broken = {**run.weights["ema"], "conv_out.bias": torch.full((4,), math.nan)}
    weights = {**run.weights, "ema": broken}
    dataclasses.replace(run, weights=weights).pretend_checkpoint(monkeypatch)
    with pytest.raises(DivergedError, match="of the ema weights are not finite"):
        evaluate_run(run.paths, run.config)
    assert not run.paths.evaluation.exists()


def test_timesteps_are_the_middles_of_equal_parts() -> None:
    assert evaluation_timesteps(8, 1000) == [62, 187, 312, 437, 562, 687, 812, 937]
    assert evaluation_timesteps(1, 1000) == [500]
    assert evaluation_timesteps(50, 10) == list(range(10))


def test_the_standard_error_is_that_of_the_samples() -> None:
    found = summary(np.array([[1.0, 3.0], [2.0, 4.0], [3.0, 5.0], [4.0, 6.0]]))
    assert found["loss"] == 3.5 and found["loss_by_timestep"] == [2.5, 4.5]
    assert found["standard_error"] == pytest.approx(math.sqrt(5 / 3) / 2)
    assert summary(np.array([[1.0]]))["standard_error"] == 0.0


def trained_on(run: TinyRun, monkeypatch: pytest.MonkeyPatch, **data: Any) -> TinyRun:
    """Return the run as if its checkpoint had been trained on what `data` names."""
    other = run.with_config(data=data)
    sets = open_datasets(other.config.data, run.paths.latents)
    digest = data_digest(sets, other.config.data)
    dataclasses.replace(other, manifest=dataclasses.replace(run.manifest, digest=digest)).pretend_checkpoint(
        monkeypatch
    )
    return other


def test_a_mixture_is_measured_on_all_its_validation_splits(
    run: TinyRun, trained: TrainedNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each loss is that of its own data set alone; a limit takes a share of each."""
    tiny_dataset(tmp_path / "other", run.paths.autoencoder, run.paths.text_encoder, count=9, validation=4)
    folders = (run.paths.latents, tmp_path / "other")
    mixed = trained_on(run, monkeypatch, mix=[{"dataset": str(folder)} for folder in folders])
    settings = {"timesteps": 3, "max_samples": 100}
    result = evaluate_run(run.paths, run.with_config(evaluate=settings).config, ["ema"])
    assert result["validation_samples"] == 9
    expected = [
        Evaluator.of(trained, HeldOut([LatentDataset(folder, "validation")]), None) for folder in folders
    ]
    every = [
        part.losses(n, result["timesteps"], 8, Progress(0)) for part, n in zip(expected, (5, 4), strict=True)
    ]
    assert result["ema"]["loss"] == pytest.approx(np.concatenate(every).mean(), rel=1e-5)
    few = evaluate_run(run.paths, run.with_config(evaluate=settings | {"max_samples": 4}).config, ["ema"])
    assert few["validation_samples"] == 4
    assert few["ema"]["loss"] == pytest.approx(np.concatenate([part[:2] for part in every]).mean(), rel=1e-5)
    prompts = chosen_prompts(mixed.config, run.paths, run.with_config(sample={"num_prompts": 9}).config)
    assert len(prompts) == 9
    Generator.load(run.paths, "ema", "cpu")  # Its encoders and null text are those of the mixture.


def test_a_data_set_in_a_store_gives_what_it_gives_in_a_folder(
    run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run.with_config(evaluate={"timesteps": 3}).config
    local = evaluate_run(run.paths, config, ["ema"])
    url = f"memory://{uuid.uuid4().hex}/set"
    store = fsspec.filesystem("memory")
    for path in run.paths.latents.rglob("*"):
        if path.is_file():
            store.pipe(f"{url}/{path.relative_to(run.paths.latents)}", path.read_bytes())
    for reads in ("shard", "range"):
        cache = str(tmp_path / reads)
        remote = trained_on(run, monkeypatch, dataset=url, cache=cache, remote_reads=reads)
        assert evaluate_run(run.paths, config, ["ema"]) == local
        prompts = chosen_prompts(remote.config, run.paths, config)
        assert prompts and prompts == chosen_prompts(run.config, run.paths, config)
        Generator.load(run.paths, "ema", "cpu")


def test_a_mixture_with_another_weight_is_not_what_was_trained_on(
    run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_dataset(tmp_path / "other", run.paths.autoencoder, run.paths.text_encoder, count=9, validation=4)
    folders = (str(run.paths.latents), str(tmp_path / "other"))
    trained_on(run, monkeypatch, mix=[{"dataset": folder} for folder in folders])
    plain = trained_network.read_manifest
    heavier = [{"dataset": folder, "weight": 1.0 + n} for n, folder in enumerate(folders)]
    config = json.loads(run.with_config(data={"mix": heavier}).config.model_dump_json())
    monkeypatch.setattr(
        trained_network, "read_manifest", lambda checkpoint: plain(checkpoint) | {"config": config}
    )
    with pytest.raises(DataError, match="digest is"):
        evaluate_run(run.paths, run.config, ["ema"])
    with pytest.raises(DataError, match="digest is"):
        Generator.load(run.paths, "ema", "cpu")
