"""Verbs that make and look at latent data sets."""

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from launch.verbs.answers import Answer, answer_alone, long_verb
from launch.verbs.arguments import ConfigPath, DatasetPath, ImageColumn, Overrides, configured

app = typer.Typer()


@long_verb(app)
def encode(config: ConfigPath, overrides: Overrides = None) -> Answer:
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
        answer_alone()
        code = run_local(again, processes, threads=run.engine.threads)
        if code:
            raise typer.Exit(code)
        return Answer(describe_dataset(out), {"dataset": out})
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
    told = {"encoded": counts.encoded, "finished_before": counts.finished_before, **asdict(counts.counts)}
    return Answer(str(counts), {"dataset": out, **told})


@long_verb(app)
def finalize(config: ConfigPath, overrides: Overrides = None) -> Answer:
    """Check that nothing was lost and write the manifest of the encoded data set.

    Example: ldm finalize configs/demo.yaml
    """
    run, paths = configured(config, overrides)
    from pipeline.paths import dataset_folder
    from preprocessing.encode_records import record_encoding
    from preprocessing.finalize import finalize_dataset

    manifest = finalize_dataset(run, dataset_folder(run, paths), run.encode.source)
    record_encoding(run, paths, dataset_folder(run, paths), manifest)
    facts = {"counts": asdict(manifest.counts), "splits": manifest.splits, "digest": manifest.digest}
    return Answer(f"{manifest.counts} {manifest.splits} digest {manifest.digest}", facts)


@long_verb(app)
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
) -> Answer:
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
    said = [f"{dataset}: {result.checked} samples checked, no problems"]
    if source is not None and decode_with is not None:
        said.append(str(compare_with(dataset, source, decode_with, image_column)))
    return Answer("\n".join(said), {"dataset": dataset, "checked": result.checked, "compared": said[1:]})


@long_verb(app)
def report(
    dataset: DatasetPath,
    source: Annotated[str, typer.Option(help="the input it was encoded from, for the originals")],
    autoencoder: Annotated[Path, typer.Option(help="autoencoder folder, for the decoded latents")],
    image_column: ImageColumn = None,
) -> Answer:
    """Write DATASET/report.html: counts, histograms, originals beside decoded latents.

    Example: ldm report runs/demo/latents --source examples/emoji --autoencoder runs/demo/autoencoder
    """
    from preprocessing.report import write_report

    page = write_report(dataset, source, autoencoder, image_column)
    return Answer(str(page), {"report": page})
