"""The verb that says what a run will cost."""

from pathlib import Path
from typing import Annotated

import typer

from launch.verbs.arguments import ConfigPath, Overrides

app = typer.Typer()


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    gpus: Annotated[
        str | None, typer.Option(help="numbers of devices; default 8,64,512 as far as the global batch goes")
    ] = None,
    device: Annotated[str, typer.Option(help="h100, h200, a100, b200, gb200 or l40s")] = "h100",
    calibrate: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="RUN", help="take the speed from this run's records; give several to set both constants"
        ),
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="of a data set that is not made yet")] = None,
    dollars: Annotated[
        float | None, typer.Option(min=0.0, help="of a device-hour; default the device's")
    ] = None,
    failures: Annotated[float, typer.Option(min=1e-6, help="of a node in a day")] = 0.005,
    write_gb_per_second: Annotated[float, typer.Option(min=1e-3, help="a node writes checkpoints")] = 2.0,
    read_gb_per_second: Annotated[float, typer.Option(min=1e-3, help="a node reads samples")] = 2.0,
    json: Annotated[bool, typer.Option("--json", help="print everything as JSON")] = False,
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="draw throughput and cost")] = None,
) -> None:
    """Say what a run will cost: memory, time, data, storage, money, what binds and what to change; without torch.

    Example: ldm plan configs/sd15-512.yaml --gpus 8,64,512 --device h100
    """
    from launch.plan import Request, plan_config
    from pipeline.plan.devices import Site

    site = Site(
        dollars=dollars,
        write_gb_per_second=write_gb_per_second,
        read_gb_per_second=read_gb_per_second,
        failures_per_node_day=failures,
    )
    planned = plan_config(
        config, overrides or (), Request(gpus, device, site, tuple(calibrate or ()), samples, json)
    )
    if png:
        from pipeline.plan.picture import draw

        draw(planned.plans, planned.title, png)
    typer.echo(planned.page)
