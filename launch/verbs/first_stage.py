"""Verbs that train the frozen models."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from launch.verbs.answers import Answer, long_verb
from launch.verbs.arguments import ConfigPath, Overrides, configured
from pipeline.config import RunConfig

app = typer.Typer()


@long_verb(app, "train-autoencoder")
def train_autoencoder(config: ConfigPath, overrides: Overrides = None) -> Answer | None:
    """Train the KL autoencoder on the source images into RUN/autoencoder, with report and reconstruction grid.

    Run again to go on where it was cut off. Alone it starts `first_stage.processes` processes; under torchrun or srun
    it is one of theirs.

    Example: ldm train-autoencoder configs/demo.yaml
    """
    run, paths = configured(config, overrides)
    rank = _own_rank("train-autoencoder", run, config, overrides)
    from pipeline.first_stage.autoencoder import train_autoencoder as train_it
    from preprocessing.pairs import prepared_pairs

    folder = train_it(run, prepared_pairs(run.autoencoder_source), paths)
    return None if rank else Answer(str(folder), {"folder": folder})


@long_verb(app, "train-clip")
def train_clip(config: ConfigPath, overrides: Overrides = None) -> Answer | None:
    """Train a small CLIP on the source pairs into RUN/clip and RUN/text_encoder.

    Run again to go on where it was cut off. Alone it starts `first_stage.processes` processes; under torchrun or srun
    it is one of theirs.

    Example: ldm train-clip configs/demo.yaml
    """
    run, paths = configured(config, overrides)
    rank = _own_rank("train-clip", run, config, overrides)
    from pipeline.first_stage.clip import train_clip as train_it
    from preprocessing.pairs import prepared_pairs

    folder = train_it(run, prepared_pairs(run.encode), paths)
    return None if rank else Answer(str(folder), {"folder": folder})


def _own_rank(verb: str, run: RunConfig, config: Path, overrides: Sequence[str] | None) -> int:
    """Return this process's rank; where nobody has started processes, start those of the config and end with them."""
    from launch.nodes import place

    placement = place(os.environ)
    processes = run.first_stage.processes if run.first_stage else 1
    if placement.source == "single" and processes > 1:
        from launch.local import run_local

        again = [sys.executable, "-m", "launch.cli", verb, str(config), *(overrides or ())]
        raise typer.Exit(run_local(again, processes, threads=run.first_stage_threads))
    return placement.rank
