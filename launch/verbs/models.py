"""Verbs around models of others: take one over."""

import json
from pathlib import Path
from typing import Annotated

import typer

from launch.verbs.answers import Answer, long_verb
from launch.verbs.arguments import ConfigPath, Overrides, configured

app = typer.Typer()


@long_verb(app, "import")
def import_model(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="diffusers pipeline or U-Net folder, run, or checkpoint")
    ],
    config: ConfigPath,
    overrides: Overrides = None,
    weights: Annotated[str, typer.Option(help="of a run: ema, another average it keeps, or raw")] = "ema",
    step: Annotated[int | None, typer.Option(help="of a run: the checkpoint [default: its newest]")] = None,
    optimizer: Annotated[
        bool, typer.Option(help="of a run: go on with its optimizer, averages and step (takes raw weights)")
    ] = False,
) -> Answer:
    """Write RUN/config.yaml for a run that begins with the weights of a diffusers folder or of another run.

    The model section comes from SOURCE, the rest from CONFIG; train.freeze keeps parts as they are.

    Example: ldm import models/sd15 configs/sd15-512.yaml name=mine 'train.freeze=[down_blocks]'
    """
    begin = {
        "source": str(source),
        "weights": "raw" if optimizer else weights,
        "step": step,
        "optimizer": optimizer,
    }
    chosen = [f"warm_start.{name}={json.dumps(value)}" for name, value in begin.items()]
    run, paths = configured(config, [*(overrides or ()), *chosen])
    from pipeline.import_pipeline import import_run

    said = list(import_run(run.warm_start, run, paths))
    said.append(f"{paths.config} written; go on with: ldm train {paths.config}")
    return Answer("\n".join(said), {"config": paths.config, "said": said})
