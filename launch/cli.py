"""The `ldm` command: one verb a function, each importing what it needs inside, so that help answers at once.

Config verbs take CONFIG [key=value ...], run verbs take a run folder. A user's mistake ends in one line on
stderr and the exit code of its error; running the same command again resumes.
"""

import json
import logging
import os
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from pipeline.errors import PipelineError

app = typer.Typer(
    name="ldm",
    help="Train text-to-image latent diffusion: image-caption shards in, a diffusers pipeline out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigPath = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="YAML file; the shipped ones are in configs/")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="settings laid over it, e.g. train.steps=100"),
]
DatasetPath = Annotated[Path, typer.Argument(metavar="DATASET", help="folder of a latent data set")]
INTERRUPTED = 130
DEMO_CONFIG = Path("configs/demo.yaml")


class Weights(StrEnum):
    """Which weights of a checkpoint."""

    EMA = "ema"
    RAW = "raw"


RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="run folder, e.g. runs/demo")]


def _configured(config: Path, overrides: Sequence[str] | None) -> tuple[Any, Any]:
    """Return (RunConfig, RunPaths) of a config verb."""
    from pipeline.config_file import load_config
    from pipeline.paths import RunPaths

    loaded = load_config(config, overrides or ())
    return loaded, RunPaths(Path(loaded.runs) / loaded.name)


def _of_run(run: Path, overrides: Sequence[str] | None) -> tuple[Any, Any]:
    """Return (RunConfig, RunPaths) of a run folder, as the run was started."""
    from pipeline.config_file import load_config
    from pipeline.errors import ConfigError
    from pipeline.paths import RunPaths

    paths = RunPaths(run)
    if not paths.config.is_file():
        raise ConfigError(f"{run}: not a run folder (no config.yaml); give one such as runs/demo")
    return load_config(paths.config, overrides or ()), paths


@app.command()
def demo(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="CONFIG KEY=VALUE", help="default configs/demo.yaml")
    ] = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="three minutes: less training, the same chain")
    ] = False,
) -> None:
    """Run the whole chain on the example data: first stage, encode, train, evaluate, sample, export.

    Example: ldm demo --fast
    """
    from launch.demo import run_demo

    given = arguments or []
    named = given[:1] if given and "=" not in given[0] else []
    run_demo(Path(*named) if named else DEMO_CONFIG, given[len(named) :], fast=fast)


@app.command()
def check(config: ConfigPath, overrides: Overrides = None) -> None:
    """Find every problem of a config without importing torch; print what follows from it.

    Example: ldm check configs/sd15-512.yaml engine.global_batch=1024
    """
    from launch.check import check_config

    typer.echo(check_config(config, overrides or ()))


@app.command()
def doctor() -> None:
    """Say what is installed, what is missing and for what, and what will be used.

    Example: ldm doctor
    """
    from launch.doctor import examine

    report, healthy = examine()
    typer.echo(report)
    raise typer.Exit(0 if healthy else 1)


@app.command("train-autoencoder")
def train_autoencoder(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train the KL autoencoder on the source images into RUN/autoencoder.

    Example: ldm train-autoencoder configs/demo.yaml
    """
    run, paths = _configured(config, overrides)
    from pipeline.first_stage.autoencoder import train_autoencoder as train_it
    from preprocessing.pairs import prepared_pairs

    typer.echo(train_it(run, prepared_pairs(run.encode), paths))


@app.command("train-clip")
def train_clip(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train a small CLIP on the source pairs into RUN/clip and RUN/text_encoder.

    Example: ldm train-clip configs/demo.yaml
    """
    run, paths = _configured(config, overrides)
    from pipeline.first_stage.clip import train_clip as train_it
    from preprocessing.pairs import prepared_pairs

    typer.echo(train_it(run, prepared_pairs(run.encode), paths))


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
    run, paths = _configured(config, overrides)
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
    run, paths = _configured(config, overrides)
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


@app.command()
def train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train the U-Net with DeepSpeed ZeRO; started again, it goes on from the newest checkpoint.

    Outside of a job it starts `engine.processes` processes itself; under srun or torchrun it is one rank.

    Example: ldm train configs/demo.yaml train.steps=2000
    """
    run, paths = _configured(config, overrides)
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
    config, paths = _of_run(run, overrides)
    from pipeline.evaluate import evaluate_run

    typer.echo(json.dumps(evaluate_run(paths, config), indent=2))


@app.command()
def sample(run: RunPath, overrides: Overrides = None) -> None:
    """Paint a grid of pictures from captions under classifier-free guidance.

    Example: ldm sample runs/demo 'sample.prompts=[red apple, green apple]' sample.guidance_scale=4.0
    """
    config, paths = _of_run(run, overrides)
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
    config, paths = _of_run(run, overrides)
    from pipeline.export import export_pipeline

    typer.echo(export_pipeline(paths, config, weights=weights.value))


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
    run, paths = _configured(config, overrides)
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
    config, paths = _of_run(run, None)
    from pipeline.tracking import sync_records

    typer.echo(f"{paths.metrics}: {sync_records(config=config, paths=paths)} records could not be sent")


@app.command()
def status(path: Annotated[Path, typer.Argument(help="run folder or data set")]) -> None:
    """Say how far a run or a data set is.

    Example: ldm status runs/demo
    """
    from launch.status import describe

    typer.echo(describe(path))


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and leave with the exit code of what happened."""
    # OpenMP threads that spin for long make a step many times slower on a CPU that does anything else beside it.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    logging.basicConfig(
        level=logging.INFO if rank == "0" else logging.WARNING, format="%(message)s", stream=sys.stderr
    )
    try:
        code = app(args=arguments, standalone_mode=False)
        if code == INTERRUPTED:
            raise KeyboardInterrupt  # typer took it, without a word to the user
        sys.exit(code if isinstance(code, int) else 0)
    except PipelineError as error:
        for line in str(error).splitlines():
            print(f"ldm: {line}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        print("ldm: interrupted; run the same command to go on", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)
    except Exception as error:
        if not hasattr(error, "show") or not hasattr(error, "exit_code"):
            raise
        error.show()  # typer's own errors: an unknown verb or option, a missing argument
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
