"""Configs that follow from a run's: its rehearsal, and the runs of a sweep."""

import re
from collections.abc import Sequence

from pipeline.config import RunConfig
from pipeline.config_file import with_settings
from pipeline.errors import ConfigError
from pipeline.paths import RunPaths, autoencoder_folder, dataset_folder, text_encoder_folder

REHEARSED_STEPS = 3
SWEEP_NAME = "sweep.json"
NAME_CHARACTERS = re.compile(r"[^A-Za-z0-9._-]+")


def rehearsal(config: RunConfig, run: RunPaths, number: int) -> RunConfig:
    """Return the config of a run beside: three steps at full micro-batch on one node, an evaluation, a checkpoint.

    Same network, data and precision; so many samples a step that every rank computes one full micro-batch. On one
    node ZeRO shares the states among fewer ranks, so what fits here fits in the run.
    """
    ranks, last = config.cluster.tasks_per_node, REHEARSED_STEPS
    return with_settings(
        config,
        _inputs(config, run)
        | {
            "name": f"rehearsal-{number}",
            "runs": str(run.root),
            "engine.global_batch": ranks * config.engine.micro_batch,
            "optimizer.warmup_steps": min(config.optimizer.warmup_steps, last),
            "train.steps": last,
            "train.log_every": 1,
            "train.checkpoint_every": last,
            "train.max_seconds": None,
            "evaluate.every": last,
            "evaluate.max_samples": min(config.evaluate.max_samples, config.evaluate.batch),
            "sample.every": None,
            "ema.posthoc": None,
            "tracking.mlflow": "off",
            "cluster.nodes": 1,
            "cluster.spares": 0,
        },
    )


def sweep(config: RunConfig, run: RunPaths, choices: Sequence[str]) -> list[RunConfig]:
    """Return a config for each combination of the values in `choices`, each such as `optimizer.learning_rate=1e-4,3e-4`.

    The runs lie below the folder of the config's own run, their parent, and share its data set and encoders.

    Raises:
        ConfigError: for a choice that is none, a value that the setting does not take, or one that changes the data.
    """
    combinations: list[dict[str, str]] = [{}]
    for choice in choices:
        key, equals, text = choice.partition("=")
        values = split_values(text)
        if not equals or not key or "" in values or len(values) != len(set(values)):
            raise ConfigError(f"--sweep {choice!r}: give KEY=VALUE,VALUE with values that differ")
        if key in ("name", "runs") or key.split(".")[0] in ("encode", "data", "first_stage", "cluster"):
            raise ConfigError(
                f"--sweep {choice!r}: the runs of a sweep share data set and cluster; sweep a setting of the training"
            )
        combinations = [{**found, key: value} for found in combinations for value in values]
    found = []
    for combination in combinations:
        name = "_".join(
            f"{key.rpartition('.')[2]}-{NAME_CHARACTERS.sub('-', value).strip('-')}"
            for key, value in combination.items()
        )
        own = {"name": name, "runs": str(run.root)}
        texts = [f"{key}={value}" for key, value in combination.items()]
        found.append(with_settings(config, _inputs(config, run) | own, texts))
    names = [variant.name for variant in found]
    if len(set(names)) < len(names):
        raise ConfigError(f"--sweep: two of its runs would share a folder: {', '.join(sorted(names))}")
    return found


def split_values(text: str) -> list[str]:
    """Return the values between the commas that stand outside of brackets and quotes."""
    values, depth, quote = [""], 0, ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        depth += (sign in "[{") - (sign in "]}")
        if sign == "," and not depth and not quote:
            values.append("")
        else:
            values[-1] += sign
    return [value.strip() for value in values]


def _inputs(config: RunConfig, run: RunPaths) -> dict[str, object]:
    """Return where the run's inputs lie, spelt out: a run beside it has another folder of its own."""
    return {
        "data.dataset": None if config.data.mix else str(dataset_folder(config, run)),
        "encode.autoencoder": str(autoencoder_folder(config, run)),
        "encode.text_encoder": str(text_encoder_folder(config, run)),
    }
