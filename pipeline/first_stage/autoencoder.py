"""`ldm train-autoencoder`: a KL autoencoder from prepared pictures, and what must be measured on it.

Loss: L1 + gradient_weight * gradient L1 + kl_weight * KL + perceptual.weight * feature distance
+ adversarial.weight * lambda * adversarial term (`terms.py` has the equations). The published weights are their average.
Scaling is measured here and applied elsewhere (`diffusion/posterior.py`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.config import AutoencoderConfig, RunConfig
from pipeline.errors import ConfigError, DivergedError
from pipeline.first_stage.autoencoder_trainee import AutoencoderTrainee
from pipeline.first_stage.feature_training import train_features
from pipeline.first_stage.features import FeatureNetwork
from pipeline.first_stage.grid import draw_reconstructions
from pipeline.first_stage.loop import train_once
from pipeline.first_stage.measure import image_batches, latent_statistics, reconstruction_quality
from pipeline.first_stage.pairs import PairTable, PreparedPair, read_pairs
from pipeline.first_stage.stage import Recipe, Stage, open_stage
from pipeline.models.autoencoder import REMEDY, WEIGHTS_STEM, build_autoencoder, save_autoencoder
from pipeline.models.model_folder import model_digest, open_model_folder
from pipeline.paths import RunPaths
from pipeline.publish import whole_folder, write_json

KIND = "autoencoder"
REPORT, GRID = "first_stage.json", "reconstruction.png"
MEASURED_IMAGES = 1024
GRID_IMAGES = 32


def train_autoencoder(config: RunConfig, pairs: Sequence[PreparedPair], paths: RunPaths) -> Path:
    """Return `paths.autoencoder`, a diffusers folder with report and grid, after training what is left to do.

    Killed and called again it goes on from the newest whole checkpoint and ends with the same bits as a straight
    run; called on a finished folder it returns at once.

    Raises:
        ConfigError: without `first_stage` in the config, or when the folder or the checkpoints belong to others.
        DivergedError: when it is no longer finite, or has collapsed.
    """
    if config.first_stage is None:
        raise ConfigError("first_stage: null, so there is nothing to train; add first_stage.autoencoder")
    section = config.first_stage.autoencoder
    if section.crop is not None and section.crop > config.encode.image_size:
        raise ConfigError(
            f"first_stage.autoencoder.crop {section.crop} is more than encode.image_size {config.encode.image_size}"
        )
    table = read_pairs(pairs, config.encode.image_size)
    features = _features(config, table, paths)
    stage = open_stage(
        config,
        paths,
        _recipe(section),
        {
            **section.model_dump(mode="json", exclude={"checkpoint_every", "log_every"}),
            "pairs": table.digest,
            "features": features.digest if features else None,
        },
    )
    trainee = AutoencoderTrainee(stage, section, table, features)
    train_once(
        stage,
        [paths.autoencoder],
        REPORT,
        lambda: trainee.with_model(build_autoencoder(section, config.encode.image_size)),
        lambda trained, noted: _publish(stage, trained, table, features, noted),
    )
    return paths.autoencoder


def _features(config: RunConfig, table: PairTable, paths: RunPaths) -> FeatureNetwork | None:
    """Return the network of the perceptual term, the user's or one trained here; None where the term is off."""
    assert config.first_stage is not None
    section = config.first_stage.autoencoder.perceptual
    if section.network is not None:
        return FeatureNetwork.load(Path(section.network))
    return FeatureNetwork.load(train_features(config, table, paths)) if section.weight else None


def _recipe(section: AutoencoderConfig) -> Recipe:
    return Recipe.paced(
        KIND, section, betas=(0.9, 0.99), weight_decay=0.0, clip_grad_norm=section.clip_grad_norm
    )


def _publish(
    stage: Stage,
    trained: AutoencoderTrainee,
    table: PairTable,
    features: FeatureNetwork | None,
    noted: dict[str, float],
) -> None:
    """Measure the trained model and put its folder in place, whole."""
    model, device = trained.published(), stage.accelerator.device
    statistics = latent_statistics(model, image_batches(table, table.train[:MEASURED_IMAGES], device))
    if not statistics.std > 0.0:
        raise DivergedError(
            f"autoencoder: the latents' std is {statistics.std} over {statistics.images} pictures, so they carry "
            f"nothing; lower first_stage.autoencoder.kl_weight or learning_rate"
        )
    quality = reconstruction_quality(model, image_batches(table, table.validation, device), features)
    shown = table.validation if len(table.validation) else table.train
    with whole_folder(stage.paths.autoencoder) as folder:
        save_autoencoder(model, folder, statistics.scaling_factor)
        found = open_model_folder(folder, WEIGHTS_STEM, REMEDY)
        pictures = list(image_batches(table, shown[:GRID_IMAGES], device))
        draw_reconstructions(model, pictures).save(folder / GRID)
        report: dict[str, Any] = {
            "kind": KIND,
            "settings": stage.settings,
            "steps": stage.recipe.steps,
            **noted,
            **quality.report(),
            "feature_network": _name_of(trained, features),
            "validation_images": len(table.validation),
            "grid_of": "validation" if len(table.validation) else "train",
            **statistics.report(),
            "digest": model_digest(found, found.config),
        }
        write_json(folder / REPORT, report)


def _name_of(trained: AutoencoderTrainee, features: FeatureNetwork | None) -> str | None:
    """Return in words whose features `feature_distance` was measured in: it took part in the training, or not."""
    if features is None:
        return None
    section = trained.section.perceptual
    whose = section.network or "trained here to tell the training pictures apart"
    part = "also a term of the loss" if section.weight else "no term of the loss"
    return f"{whose}; {part}; sha256 {features.digest}"
