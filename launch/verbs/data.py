"""Verbs that make and look at latent data sets."""

from pathlib import Path
from typing import Annotated

import typer

from launch.verbs.arguments import ConfigPath, DatasetPath, Overrides, configured

app = typer.Typer()


@app.command()
def encode(
    config: ConfigPath,
    overrides: Overrides = None,
    worker: Annotated[int, typer.Option(min=0, help="number of this worker, from 0")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="how many workers share the input")] = 1,
) -> None:
    """Encode the source into latents and text states; finished shards are skipped.

    Example: ldm encode configs/demo.yaml --worker 0 --workers 4
    """
    run, paths = configured(config, overrides)
    from pipeline.paths import autoencoder_folder, dataset_folder, text_encoder_folder
    from preprocessing.work import encode_dataset

    counts = encode_dataset(
        run,
        source=Path(run.encode.source),
        out=dataset_folder(run, paths),
        autoencoder=autoencoder_folder(run, paths),
        text_encoder=text_encoder_folder(run, paths),
        worker=worker,
        workers=workers,
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

    manifest = finalize_dataset(run, dataset_folder(run, paths), Path(run.encode.source))
    typer.echo(f"{manifest.counts} {manifest.splits} digest {manifest.digest}")


@app.command()
def verify(
    dataset: DatasetPath,
    samples: Annotated[
        int | None, typer.Option(min=1, help="how many samples to re-read; default all")
    ] = None,
    decode_with: Annotated[Path | None, typer.Option(help="autoencoder folder: decodes latents too")] = None,
) -> None:
    """Re-read a data set: counts, checksums, shapes, finite values; list every problem.

    Example: ldm verify runs/demo/latents
    """
    from pipeline.errors import DataError
    from pipeline.latents.manifest import Manifest

    Manifest.load(dataset)  # Before the heavy imports: a wrong folder is said at once.
    from preprocessing.verify import verify_dataset

    result = verify_dataset(dataset, samples=samples, decode_with=decode_with)
    if result.problems:
        raise DataError("\n".join(result.problems))
    typer.echo(f"{dataset}: {result.checked} samples checked, no problems")


@app.command()
def report(
    dataset: DatasetPath,
    source: Annotated[Path, typer.Option(help="the input it was encoded from, for the originals")],
    autoencoder: Annotated[Path, typer.Option(help="autoencoder folder, for the decoded latents")],
) -> None:
    """Write DATASET/report.html: counts, histograms, originals beside decoded latents.

    Example: ldm report runs/demo/latents --source examples/emoji --autoencoder runs/demo/autoencoder
    """
    from preprocessing.report import write_report

    typer.echo(write_report(dataset, source, autoencoder))
