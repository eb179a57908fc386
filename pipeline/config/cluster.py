"""Where a run runs."""

from pydantic import Field

from pipeline.config.base import Count, Positive, Section


class ClusterConfig(Section):
    """The Slurm job of this run."""

    partition: str | None = None
    account: str | None = None
    nodes: Positive = 1
    tasks_per_node: Positive = Field(1, description="one task a device")
    gpus_per_node: Count = 0
    cpus_per_task: Positive = 1
    memory_gib_per_node: Count = Field(0, description="0 = all of the node's memory")
    time: str = Field(
        "24:00:00", pattern=r"^(\d+-)?\d{1,2}:\d{2}:\d{2}$", description="[days-]hours:minutes:seconds"
    )
    signal_lead_seconds: Positive = Field(
        300, description="warning before the time limit: at least two saves"
    )
    exclude: tuple[str, ...] = ()
    setup: tuple[str, ...] = Field(
        (), description="shell lines run before the job, for modules and environments"
    )
