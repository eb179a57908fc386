"""Verbs to begin with."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from launch.verbs.answers import Answer, answer_alone, long_verb
from launch.verbs.arguments import ConfigPath, Overrides
from pipeline.errors import ConfigError

app = typer.Typer()

DEMO_CONFIG, LONG_CONFIG = Path("configs/demo.yaml"), Path("configs/long.yaml")


@long_verb(app)
def demo(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="CONFIG KEY=VALUE", help="default configs/demo.yaml")
    ] = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="three minutes: less training, the same chain")
    ] = False,
    long: Annotated[
        bool, typer.Option("--long", help="two hours: all subjects of the example data (configs/long.yaml)")
    ] = False,
) -> Answer:
    """Run the whole chain on the example data: first stage, encode, train, evaluate, sample, export.

    Example: ldm demo --fast
    """
    from launch.demo import run_demo

    given = arguments or []
    named = given[:1] if given and "=" not in given[0] else []
    if long and (fast or named):
        raise ConfigError(f"--long is {LONG_CONFIG} in full: it goes with neither --fast nor a CONFIG")
    answer_alone()
    config = Path(*named) if named else LONG_CONFIG if long else DEMO_CONFIG
    painted = run_demo(config, given[len(named) :], fast=fast)
    return Answer(painted.words, painted.facts)


@long_verb(app)
def init(
    folder: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER", help="pictures with captions, img2dataset shards, parquet; or s3://"
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="where NAME.yaml and NAME.html go")] = Path("."),
    name: Annotated[str | None, typer.Option(help="of the run; default the folder's")] = None,
    device: Annotated[
        Literal["cpu", "gpu"] | None, typer.Option(help="to propose for; default what is here")
    ] = None,
    minutes: Annotated[int | None, typer.Option(min=1, help="the run may take; default 20 on a CPU")] = None,
) -> Answer:
    """Look at a folder of pictures with captions and write a config for it, with reasons, and a report.

    Example: ldm init photos --minutes 60
    """
    from launch.init.folder import init_folder
    from launch.init.proposal import Machine

    made = init_folder(folder, out, Machine.here(device, minutes), name)
    return Answer(made.words, {"words": made.words.splitlines()})


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
