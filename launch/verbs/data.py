"""Verbs that make and look at latent data sets."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from launch.verbs.arguments import ConfigPath, DatasetPath, ImageColumn, Overrides, configured

app = typer.Typer()


@app.command()
def encode(config: ConfigPath, overrides: Overrides = None) -> None:
    """Encode the source into latents and text states; finished shards are skipped.

    Alone it starts `encode.processes` workers, by default one a GPU; under srun, torchrun or accelerate it is one
    worker. Any number may run at once, come and go, and be killed: shards are leased, and nobody encodes twice.

    Example: ldm encode configs/demo.yaml encode.processes=2
    """
    run, paths = configured(config, overrides)
    from launch.local import run_local
    from launch.nodes import place
    from launch.status import describe_dataset
    from launch.submit.chain import worker_of
    from pipeline.paths import autoencoder_folder, dataset_folder, text_encoder_folder
    from preprocessing.work import encode_dataset, processes_here

    placement, out = place(os.environ, meets=False), dataset_folder(run, paths)
    processes = processes_here(run) if placement.source == "single" else 1
    if processes > 1:
        again = [sys.executable, "-m", "launch.cli", "encode", str(config), *(overrides or ())]
        code = run_local(again, processes, threads=run.engine.threads)
        if code == 0:
            typer.echo(describe_dataset(out))
        raise typer.Exit(code)
    worker, workers = worker_of(placement, os.environ)
    counts = encode_dataset(
        run,
        source=run.encode.source,
        out=out,
        autoencoder=autoencoder_folder(run, paths),
        text_encoder=text_encoder_folder(run, paths),
        worker=worker,
        workers=workers,
        local_worker=placement.local_rank,
    )
    typer.echo(counts)


@app.command()
def finalize(config: ConfigPath, overrides: Overrides = None) -> None:
    """Check that nothing was lost and write the manifest of the encoded data set.

    Example: ldm finalize configs/demo.yaml
    """
    run, paths = configured(config, overrides)
    from pipeline.paths import dataset_folder
    from preprocessing.finalize import finalize_dataset

    manifest = finalize_dataset(run, dataset_folder(run, paths), run.encode.source)
    typer.echo(f"{manifest.counts} {manifest.splits} digest {manifest.digest}")


@app.command()
def verify(
    dataset: DatasetPath,
    samples: Annotated[
        int | None, typer.Option(min=1, help="how many samples to re-read; default all")
    ] = None,
    decode_with: Annotated[Path | None, typer.Option(help="autoencoder folder: decodes latents too")] = None,
    source: Annotated[
        str | None, typer.Option(help="with --decode-with: compares with the originals in this input")
    ] = None,
    image_column: ImageColumn = None,
) -> None:
    """Re-read a data set: counts, checksums, shapes, finite values; list every problem.

    Example: ldm verify runs/demo/latents --decode-with runs/demo/autoencoder --source examples/emoji
    """
    from pipeline.errors import DataError
    from pipeline.latents.manifest import Manifest

    Manifest.load(dataset)  # Before the heavy imports: a wrong folder is said at once.
    from preprocessing.report import compare_with
    from preprocessing.verify import verify_dataset

    result = verify_dataset(dataset, samples=samples, decode_with=decode_with)
    if result.problems:
        raise DataError("\n".join(result.problems))
    typer.echo(f"{dataset}: {result.checked} samples checked, no problems")
    if source is not None and decode_with is not None:
        typer.echo(compare_with(dataset, source, decode_with, image_column))


@app.command()
def report(
    dataset: DatasetPath,
    source: Annotated[str, typer.Option(help="the input it was encoded from, for the originals")],
    autoencoder: Annotated[Path, typer.Option(help="autoencoder folder, for the decoded latents")],
    image_column: ImageColumn = None,
) -> None:
    """Write DATASET/report.html: counts, histograms, originals beside decoded latents.

    Example: ldm report runs/demo/latents --source examples/emoji --autoencoder runs/demo/autoencoder
    """
    from preprocessing.report import write_report

    typer.echo(write_report(dataset, source, autoencoder, image_column))
