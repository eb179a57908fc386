"""Verbs that train the frozen models."""

import typer

from launch.verbs.answers import Answer, long_verb
from launch.verbs.arguments import ConfigPath, Overrides, configured

app = typer.Typer()


@long_verb(app, "train-autoencoder")
def train_autoencoder(config: ConfigPath, overrides: Overrides = None) -> Answer:
    """Train the KL autoencoder on the source images into RUN/autoencoder, with report and reconstruction grid.

    Run again to go on where it was cut off; on several processes under torchrun.

    Example: ldm train-autoencoder configs/demo.yaml
    """
    run, paths = configured(config, overrides)
    from pipeline.first_stage.autoencoder import train_autoencoder as train_it
    from preprocessing.pairs import prepared_pairs

    folder = train_it(run, prepared_pairs(run.autoencoder_source), paths)
    return Answer(str(folder), {"folder": folder})


@long_verb(app, "train-clip")
def train_clip(config: ConfigPath, overrides: Overrides = None) -> Answer:
    """Train a small CLIP on the source pairs into RUN/clip and RUN/text_encoder.

    Run again to go on where it was cut off; on several processes under torchrun.

    Example: ldm train-clip configs/demo.yaml
    """
    run, paths = configured(config, overrides)
    from pipeline.first_stage.clip import train_clip as train_it
    from preprocessing.pairs import prepared_pairs

    folder = train_it(run, prepared_pairs(run.encode), paths)
    return Answer(str(folder), {"folder": folder})
