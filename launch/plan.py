"""`ldm plan`: what a run will cost, from its config alone."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.config import RunConfig
from pipeline.config_file import load_config
from pipeline.errors import ConfigError
from pipeline.paths import RunPaths
from pipeline.plan.calibrate import calibrate, ranks_of
from pipeline.plan.devices import Site, device_named
from pipeline.plan.estimate import Estimate, Target, estimate
from pipeline.plan.published import newest
from pipeline.plan.report import as_json, text
from pipeline.plan.workload import workload_of

USUAL = (8, 64, 512)


@dataclass(frozen=True)
class Request:
    """What the command line asks for beside the config."""

    gpus: str | None = None
    """None = of 8, 64 and 512 what the global batch allows, else as many as the config starts."""
    device: str = "h100"
    site: Site = field(default_factory=Site)
    runs: tuple[Path, ...] = ()
    samples: int | None = None
    as_json: bool = False


@dataclass(frozen=True)
class Planned:
    """A page, and what stands on it."""

    page: str
    title: str
    plans: tuple[Estimate, ...]


def plan_config(path: Path, overrides: Sequence[str] = (), request: Request | None = None) -> Planned:
    """Return the page, or the JSON, about the run described by `path`.

    Raises:
        ConfigError: the config is wrong, a number of devices is impossible, the device unknown, a run unfit.
    """
    request = request or Request()
    config = load_config(path, overrides)
    ranks = _ranks(request.gpus, config)
    device = device_named(request.device)
    target = Target(
        device, newest(device.name), request.site, calibrate(request.runs) if request.runs else None
    )
    workload = workload_of(config, RunPaths(Path(config.runs) / config.name), request.samples)
    plans = tuple(estimate(workload, target, count) for count in ranks)
    page = (
        json.dumps(as_json(workload, target, plans), indent=2)
        if request.as_json
        else text(workload, target, plans)
    )
    return Planned(page, f"{config.name} on {device.name}", plans)


def _ranks(given: str | None, config: RunConfig) -> list[int]:
    """Return the numbers of devices, ascending.

    Raises:
        ConfigError: something that is no number, or more devices than the global batch has samples.
    """
    if given is None:
        usual = [count for count in USUAL if count <= config.engine.global_batch]
        return usual if len(usual) > 1 else [ranks_of(config)]
    try:
        counts = sorted({int(part) for part in given.split(",")})
    except ValueError:
        raise ConfigError(f"plan --gpus: {given!r} is no list of numbers such as 8,64,512") from None
    batch = config.engine.global_batch
    impossible = [count for count in counts if not 1 <= count <= batch]
    if impossible:
        raise ConfigError(
            f"plan --gpus: {', '.join(map(str, impossible))} devices for a global batch of {batch}: every rank needs a sample "
            f"a step; give 1 to {batch}, or raise engine.global_batch"
        )
    return counts
