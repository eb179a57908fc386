"""Verbs around one training run: train, measure, paint, hand over."""

import json
import os
import sys
from typing import Annotated

import typer

from launch.verbs.arguments import ConfigPath, Overrides, RunPath, Weights, configured, of_run

app = typer.Typer()


@app.command()
def train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train the U-Net with DeepSpeed ZeRO; started again, it goes on from the newest checkpoint.

    Outside of a job it starts `engine.processes` processes itself; under srun or torchrun it is one rank.

    Example: ldm train configs/demo.yaml train.steps=2000
    """
    run, paths = configured(config, overrides)
    from launch.local import run_local
    from launch.nodes import place

    placement = place(os.environ)
    if placement.source == "single" and run.engine.processes > 1:
        from launch.check import refuse_untrainable

        refuse_untrainable(run, paths, str(config))
        again = [sys.executable, "-m", "launch.cli", "train", str(config), *(overrides or ())]
        raise typer.Exit(run_local(again, run.engine.processes, threads=run.engine.threads))
    from launch.rank import train_rank

    line = train_rank(run, paths, placement)
    if line:
        typer.echo(line)


@app.command()
def evaluate(run: RunPath, overrides: Overrides = None) -> None:
    """Measure the validation loss at fixed timesteps under raw and EMA weights.

    Example: ldm evaluate runs/demo
    """
    config, paths = of_run(run, overrides)
    from pipeline.evaluate import evaluate_run

    typer.echo(json.dumps(evaluate_run(paths, config), indent=2))


@app.command()
def sample(run: RunPath, overrides: Overrides = None) -> None:
    """Paint a grid of pictures from captions under classifier-free guidance.

    Example: ldm sample runs/demo 'sample.prompts=[red apple, green apple]' sample.guidance_scale=4.0
    """
    config, paths = of_run(run, overrides)
    from pipeline.sample import sample_grid

    typer.echo(sample_grid(paths, config))


@app.command()
def export(
    run: RunPath,
    overrides: Overrides = None,
    weights: Annotated[Weights, typer.Option(help="which weights")] = Weights.EMA,
) -> None:
    """Write RUN/pipeline, a folder that diffusers' StableDiffusionPipeline.from_pretrained loads.

    Example: ldm export runs/demo
    """
    config, paths = of_run(run, overrides)
    from pipeline.export import export_pipeline

    typer.echo(export_pipeline(paths, config, weights=weights.value))
