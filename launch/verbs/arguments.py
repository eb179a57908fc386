"""The arguments that verbs share, and what they open."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

ConfigPath = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="YAML file; the shipped ones are in configs/")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="settings laid over it, e.g. train.steps=100"),
]
DatasetPath = Annotated[Path, typer.Argument(metavar="DATASET", help="folder of a latent data set")]


ImageColumn = Annotated[
    str | None, typer.Option(help="column of image bytes in parquet shards, where the config named one")
]


RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="run folder, e.g. runs/demo")]


def configured(config: Path, overrides: Sequence[str] | None) -> tuple[Any, Any]:
    """Return (RunConfig, RunPaths) of a config verb."""
    from pipeline.config_file import load_config
    from pipeline.paths import RunPaths

    loaded = load_config(config, overrides or ())
    return loaded, RunPaths(Path(loaded.runs) / loaded.name)


def of_run(run: Path, overrides: Sequence[str] | None) -> tuple[Any, Any]:
    """Return (RunConfig, RunPaths) of a run folder, as the run was started."""
    from pipeline.config_file import load_config
    from pipeline.errors import ConfigError
    from pipeline.paths import RunPaths

    paths = RunPaths(run)
    if not paths.config.is_file():
        raise ConfigError(f"{run}: not a run folder (no config.yaml); give one such as runs/demo")
    return load_config(paths.config, overrides or ()), paths
