"""`ldm submit`: plan, check, snapshot, hand over; one run or the runs of a sweep."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.slurm.jobs import read_jobs
from launch.slurm.render import Stage
from launch.submit.chain import (
    Surroundings,
    Wish,
    describe_jobs,
    plan_jobs,
    run_here,
    stages_of,
    submit_jobs,
    write_configs,
)
from launch.submit.preflight import preflight
from launch.submit.snapshot import snapshot_code
from launch.submit.variants import SWEEP_NAME, sweep
from pipeline import publish
from pipeline.config import RunConfig
from pipeline.config_file import load_config
from pipeline.errors import ConfigError
from pipeline.paths import RunPaths


@dataclass(frozen=True)
class Request:
    """What the user wants submitted."""

    config: Path
    overrides: Sequence[str] = ()
    site: Path | None = None
    wish: Wish = "train"
    rehearse: bool = False
    sweep: Sequence[str] = ()
    accept_data_change: bool = False
    dry_run: bool = False

    def surroundings(self, code: Path | None = None) -> Surroundings:
        """Return what the jobs take along, with `code` of their own."""
        return Surroundings(Path.cwd(), code, self.accept_data_change)


def submit(request: Request) -> str:
    """Submit what is asked for and return a page about it; a dry run writes nothing and needs no Slurm.

    Raises:
        ConfigError: with a line for each problem.
        ToolError: when Slurm refuses or does not answer.
        SystemExit: on a site without Slurm, with the exit code of the stage that failed.
    """
    config = load_config(request.config, request.overrides, request.site)
    run = RunPaths((Path(config.runs) / config.name).absolute())
    if request.sweep:
        return _submit_sweep(request, config, run)
    return _submit_run(request, config, run)


def _submit_run(request: Request, config: RunConfig, run: RunPaths) -> str:
    stages = stages_of(request.wish, rehearse=request.rehearse)
    if request.dry_run:
        return describe_jobs(plan_jobs(config, run, stages, request.surroundings()))
    facts = _check(request, config, run, stages)
    words = _hand_over(request, config, run, stages)
    return "\n".join([*(f"  {fact}" for fact in facts), words])


def _check(
    request: Request, config: RunConfig, run: RunPaths, stages: Sequence[Stage], *, awaits_data: bool = False
) -> list[str]:
    jobs = plan_jobs(config, run, stages, request.surroundings())
    return preflight(config, run, jobs, str(request.config), awaits_data=awaits_data)


def _hand_over(
    request: Request, config: RunConfig, run: RunPaths, stages: Sequence[Stage], after: str | None = None
) -> str:
    """Snapshot the code, write what the jobs read, and submit them, the first after job `after`."""
    jobs = plan_jobs(config, run, stages, request.surroundings(snapshot_code(run.root)))
    write_configs(jobs)
    run.cancelled.unlink(missing_ok=True)
    if config.cluster.scheduler == "none":
        run_here(jobs)
        return f"{run.root}: {', '.join(stages)} done"
    submitted = submit_jobs(jobs, run.jobs, after=after)
    named = ", then ".join(f"{job.stage} {done.job_id}" for job, done in zip(jobs, submitted, strict=True))
    return f"submitted {named}; follow with `ldm status {run.root}`"


def _submit_sweep(request: Request, config: RunConfig, run: RunPaths) -> str:
    """Check every run of the sweep before the first is submitted."""
    if request.wish == "encode":
        raise ConfigError(
            "--sweep with --stage encode: the runs of a sweep share one data set; encode it once"
        )
    variants = sweep(config, run, request.sweep)
    places = [RunPaths(run.root / variant.name) for variant in variants]
    stages = stages_of("train", rehearse=request.rehearse)
    if request.dry_run:
        made = [(config, run, stages_of("encode", rehearse=False))] if request.wish == "all" else []
        wanted = [*made, *((variant, place, stages) for variant, place in zip(variants, places, strict=True))]
        return "\n".join(describe_jobs(plan_jobs(*job, request.surroundings())) for job in wanted)
    problems, pages, after = [], [], None
    for variant, place in zip(variants, places, strict=True):
        try:
            _check(request, variant, place, stages, awaits_data=request.wish == "all")
        except ConfigError as error:
            problems += [line for line in error.problems if line not in problems]
    if problems:
        raise ConfigError(problems)
    publish.write_json(
        run.root / SWEEP_NAME, {"sweep": list(request.sweep), "runs": [variant.name for variant in variants]}
    )
    if request.wish == "all":
        encode = dataclasses.replace(request, wish="encode", rehearse=False, sweep=())
        pages.append(_submit_run(encode, config, run))
        jobs = read_jobs(run.jobs)
        after = str(jobs[-1]["job_id"]) if jobs else None
    pages += [
        _hand_over(request, variant, place, stages, after)
        for variant, place in zip(variants, places, strict=True)
    ]
    return "\n".join(pages)
