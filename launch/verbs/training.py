"""Verbs around training runs: train, measure, paint, compare, hand over."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from launch.verbs.answers import Answer, long_verb
from launch.verbs.arguments import ConfigPath, Overrides, RunPath, configured, of_run

app = typer.Typer()
WEIGHTS_HELP = "raw, ema, another average of the checkpoint, or a name that `ldm ema` has made"


@long_verb(app)
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    accept_data_change: Annotated[
        bool,
        typer.Option(
            "--accept-data-change", help="on other data than before, begin a new epoch where the run stands"
        ),
    ] = False,
) -> Answer | None:
    """Train the U-Net with DeepSpeed ZeRO; started again, it goes on from the newest checkpoint.

    Outside of a job it starts `engine.processes` processes itself, and again after a crash or a hang behind a newer checkpoint;
    under srun or torchrun it is one rank.

    Example: ldm train configs/demo.yaml train.steps=2000
    """
    run, paths = configured(config, overrides)
    from launch.local import train_local
    from launch.nodes import place

    placement = place(os.environ)
    if placement.source == "single":
        from launch.check import refuse_untrainable

        refuse_untrainable(run, paths, str(config))
    if placement.source == "single" and run.engine.processes > 1:
        again = [sys.executable, "-m", "launch.cli", "train", str(config), *(overrides or ())]
        again += ["--accept-data-change"] * accept_data_change
        raise typer.Exit(
            train_local(again, run.engine.processes, paths, threads=run.engine.threads, health=run.health)
        )
    from launch.rank import train_rank

    done = train_rank(run, paths, placement, accept_data_change=accept_data_change)
    if placement.rank:
        return None
    facts = {"run": paths.root, "step": done.step, "samples": done.samples, "loss": done.loss}
    return Answer(f"{paths.root}: step {done.step}, {done.samples} samples, loss {done.loss:.4f}", facts)


@long_verb(app)
def evaluate(
    run: RunPath,
    overrides: Overrides = None,
    weights: Annotated[
        list[str] | None, typer.Option(help=f"{WEIGHTS_HELP}; may be repeated [default: raw and ema]")
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="real pictures to compare with [default: validation latents]"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print RUN/evaluation.json, not a table")] = False,
) -> None:
    """Measure the newest checkpoint: validation loss at fixed timesteps, and the pictures as evaluate.metrics says.

    Metrics: kid, frechet, precision_recall, clip, memorisation (docs/evaluation.md). Under torchrun or srun the work is
    shared, and the numbers stay the same.

    Example: ldm evaluate runs/demo 'evaluate.metrics=[kid, clip, memorisation]'
    """
    chosen = [f"evaluate.reference={json.dumps(reference)}"] if reference else []
    config, paths = of_run(run, [*(overrides or ()), *chosen])
    from launch.measure import evaluate_here
    from launch.nodes import place
    from pipeline.evaluation.report import table

    result = evaluate_here(paths, config, weights, place(os.environ))
    if result is not None:
        typer.echo(json.dumps(result, indent=2) if as_json else table(result))


@long_verb(app)
def sample(
    run: RunPath,
    overrides: Overrides = None,
    weights: Annotated[
        str | None, typer.Option(help=f"{WEIGHTS_HELP} [default: sample.weights, ema]")
    ] = None,
) -> Answer:
    """Paint a grid of pictures from captions under classifier-free guidance.

    Example: ldm sample runs/demo 'sample.prompts=[red apple, green apple]' sample.guidance_scale=4.0
    """
    chosen = [f"sample.weights={weights}"] if weights else []
    config, paths = of_run(run, [*(overrides or ()), *chosen])
    from pipeline.sample import sample_grid

    grid = sample_grid(paths, config)
    return Answer(str(grid), {"grid": grid})


@long_verb(app)
def gallery(
    run: RunPath,
    overrides: Overrides = None,
    prompts: Annotated[int, typer.Option(min=1, help="painted, the first of sample.prompts")] = 6,
    scales: Annotated[
        str, typer.Option(metavar="LIST", help="guidance scales of the sweep")
    ] = "1,2,3,5,8,12",
) -> Answer:
    """Show what the network does: how it learned, raw beside EMA, guidance, from noise to picture, where it looks.

    Writes RUN/gallery/step-XXXXXXXX: five sheets of the same prompts and noise, and a page that shows them.

    Example: ldm gallery runs/demo --prompts 4 'sample.prompts=[a red apple, a green apple]'
    """
    config, paths = of_run(run, overrides)
    from pipeline.gallery.gallery import guidance_scales, make_gallery

    page = make_gallery(paths, config, prompts_at_most=prompts, scales=guidance_scales(scales))
    return Answer(str(page), {"page": page})


@long_verb(app)
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="run folders, e.g. runs/a runs/b")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="the page to write")] = Path("compare.html"),
) -> Answer:
    """Write one page with several runs beside each other: settings that differ, curves, evaluation, painted grids.

    A static file that needs no network. Runs may be of any length, under way, failed or not measured yet.

    Example: ldm compare runs/demo runs/demo-wide --out compare.html
    """
    from launch.compare.page import render
    from launch.compare.runs import compared_runs
    from pipeline.publish import write_bytes

    write_bytes(out, render(compared_runs(runs)).encode())
    return Answer(str(out), {"page": out, "runs": runs})


@long_verb(app)
def export(
    run: RunPath,
    overrides: Overrides = None,
    weights: Annotated[str, typer.Option(help=WEIGHTS_HELP)] = "ema",
    deepspeed: Annotated[
        bool,
        typer.Option("--deepspeed", help="write RUN/deepspeed instead: DeepSpeed's universal checkpoint"),
    ] = False,
) -> Answer:
    """Write RUN/pipeline, a folder that diffusers' StableDiffusionPipeline.from_pretrained loads.

    With --deepspeed write RUN/deepspeed: raw weights and Adam's moments, for `engine.load_checkpoint` of a script of
    your own with `"checkpoint": {"load_universal": true}`, at any number of processes and ZeRO stage 1 to 3.

    Example: ldm export runs/demo
    """
    config, paths = of_run(run, overrides)
    if deepspeed:
        from pipeline.training.saving.deepspeed_export import export_deepspeed

        folder = export_deepspeed(paths)
        return Answer(str(folder), {"deepspeed": folder})
    from pipeline.export import export_pipeline

    folder = export_pipeline(paths, config, weights=weights)
    return Answer(str(folder), {"pipeline": folder})
