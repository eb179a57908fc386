"""Verbs that run and follow jobs."""

from pathlib import Path
from typing import Annotated

import typer

from launch.verbs.arguments import ConfigPath, Overrides, RunPath, configured, of_run

app = typer.Typer()


@app.command()
def submit(
    config: ConfigPath,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the batch script, submit nothing")
    ] = False,
) -> None:
    """Submit the training to Slurm, one task a device.

    Example: ldm submit configs/sd15-512.yaml --dry-run
    """
    run, paths = configured(config, overrides)
    from launch.check import refuse_untrainable
    from launch.slurm import submit_job

    if not dry_run:  # A wrong config costs a second here, and a place in the queue later.
        refuse_untrainable(run, paths, str(config))
    job = submit_job(run, paths, dry_run=dry_run)
    typer.echo(
        job.script
        if job.job_id is None
        else f"submitted job {job.job_id}; follow it with ldm status {paths.root}"
    )


@app.command()
def sync(run: RunPath) -> None:
    """Send the records that MLflow does not have yet from metrics.jsonl; from one machine at a time.

    Example: ldm sync runs/demo
    """
    config, paths = of_run(run, None)
    from pipeline.tracking import sync_records

    typer.echo(f"{paths.metrics}: {sync_records(config=config, paths=paths)} records could not be sent")


@app.command()
def status(path: Annotated[Path, typer.Argument(help="run folder or data set")]) -> None:
    """Say how far a run or a data set is.

    Example: ldm status runs/demo
    """
    from launch.status import describe

    typer.echo(describe(path))
