"""The verb that makes averaged weights after the training."""

from typing import Annotated

import typer

from launch.verbs.answers import Answer, long_verb
from launch.verbs.arguments import RunPath, of_run

app = typer.Typer()


@long_verb(app)
def ema(
    run: RunPath,
    sigma_rel: Annotated[float, typer.Option(help="width of the average, as a part of the training")] = 0.10,
    step: Annotated[int | None, typer.Option(help="a step with a snapshot; left out: the newest")] = None,
) -> Answer:
    """Write RUN/weights/NAME, an average of any length made of the run's snapshots; take it with --weights NAME.

    Example: ldm ema runs/demo --sigma-rel 0.10
    """
    _, paths = of_run(run, None)
    from pipeline.average import reconstruct

    name = reconstruct(paths, sigma_rel, step)
    return Answer(str(name), {"weights": name})
