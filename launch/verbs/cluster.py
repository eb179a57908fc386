"""Verbs that run and follow jobs."""

import sys
import time
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from launch.verbs.answers import Answer, long_verb
from launch.verbs.arguments import ConfigPath, Overrides, RunPath, of_run
from pipeline.errors import PipelineError

app = typer.Typer()


class StageChoice(Enum):
    """What `submit` makes."""

    ENCODE = "encode"
    TRAIN = "train"
    ALL = "all"


@app.command()
def submit(
    config: ConfigPath,
    overrides: Overrides = None,
    stage: Annotated[
        StageChoice, typer.Option(help="all: encode by an array of workers, finalize, train")
    ] = StageChoice.TRAIN,
    site: Annotated[
        Path | None,
        typer.Option(help="YAML file with settings of `cluster`, e.g. configs/cluster/slurm-h100.yaml"),
    ] = None,
    rehearse: Annotated[
        bool,
        typer.Option(
            "--rehearse",
            help="three real steps, an evaluation and a checkpoint on one node before the big job",
        ),
    ] = False,
    sweep: Annotated[
        list[str] | None, typer.Option(metavar="KEY=A,B,C", help="a run for each value; may be repeated")
    ] = None,
    accept_data_change: Annotated[
        bool,
        typer.Option(
            "--accept-data-change", help="on other data than before, begin a new epoch where the run stands"
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the batch scripts and commands, submit nothing")
    ] = False,
) -> None:
    """Submit a run to Slurm after looking for everything that could stop it: one task a device, resumed by itself.

    Example: ldm submit configs/sd15-512.yaml --site configs/cluster/slurm-h100.yaml --stage all --rehearse --dry-run
    """
    from launch.submit.run import Request
    from launch.submit.run import submit as submit_request

    request = Request(
        config,
        overrides or (),
        site,
        stage.value,
        rehearse=rehearse,
        sweep=sweep or (),
        accept_data_change=accept_data_change,
        dry_run=dry_run,
    )
    typer.echo(submit_request(request))


@long_verb(app)
def sync(run: RunPath, overrides: Overrides = None) -> Answer:
    """Send the records and pictures of a run that MLflow does not have yet; from one machine at a time.

    Example: ldm sync runs/demo tracking.mlflow=http://mlflow.example:5000
    """
    config, paths = of_run(run, overrides)
    from pipeline.tracking import sync_records

    left = sync_records(paths, config)
    if left:
        raise PipelineError(f"{paths.root}: {left} records or files could not be sent; sync again later")
    return Answer(f"{paths.root}: MLflow has every record", {"run": paths.root, "unsent": left})


@app.command()
def status(
    path: Annotated[Path, typer.Argument(help="run folder, sweep or data set")],
    watch: Annotated[bool, typer.Option("--watch", help="again every few seconds, until Ctrl-C")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object, of a run folder")] = False,
) -> None:
    """Say how far a run or a data set is: step, loss, speed, time left, checkpoints, restarts, jobs.

    Example: ldm status runs/demo --watch
    """
    from launch.follow.run import json_of, run_status
    from launch.status import WATCH_SECONDS, describe
    from pipeline.paths import RunPaths

    while True:
        page = json_of(run_status(RunPaths(path))) if as_json else describe(path)
        cleared = "\033[2J\033[H" if watch and sys.stdout.isatty() else ""
        typer.echo(cleared + page)
        if not watch:
            return
        time.sleep(WATCH_SECONDS)


@app.command()
def cancel(
    run: RunPath,
    wait_seconds: Annotated[
        float, typer.Option("--wait-seconds", min=1.0, help="how long the training may take to save")
    ] = 600.0,
) -> None:
    """End the jobs of a run, or of a sweep's runs; a training saves first, and the same `ldm submit` goes on from there.

    Example: ldm cancel runs/sd15-512
    """
    from launch.follow.cancel import cancel as cancel_all

    typer.echo(cancel_all(run, wait_seconds=wait_seconds, say=typer.echo))


@app.command()
def logs(
    run: RunPath,
    rank: Annotated[
        int | None, typer.Option(min=0, help="what this rank wrote; default: what the jobs themselves said")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="go on with what is written later")] = False,
) -> None:
    """Print what one rank of a run wrote, over all its attempts.

    Example: ldm logs runs/sd15-512 --rank 3 --follow
    """
    from launch.follow.logs import log_lines
    from pipeline.paths import RunPaths

    for line in log_lines(RunPaths(run), rank, follow=follow):
        typer.echo(line)
