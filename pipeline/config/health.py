"""When a run is ill, and what is done about it."""

from pydantic import Field

from pipeline.config.base import Count, Positive, Section


class HealthConfig(Section):
    """Budgets for bad steps, checks between ranks, and the way back."""

    max_skipped_in_a_row: Positive = Field(
        5, description="non-finite steps in a row before the run ends with exit code 5"
    )
    max_skipped_percent: float = Field(
        1.0,
        gt=0.0,
        le=100.0,
        description="of the last skipped_window steps; more of them end the run as well",
    )
    skipped_window: Positive = Field(1000, description="steps over which max_skipped_percent is counted")
    spike_window: Positive = Field(
        200, ge=20, description="applied steps whose losses and gradient norms say what is usual"
    )
    spike_deviations: float = Field(
        10.0, gt=0.0, description="robust standard deviations above the window's median that make a spike"
    )
    confirmed_spikes: Positive = Field(
        5, description="steps in a row with a loss spike that are no accident: the run goes back, if it may"
    )
    rollback: bool = Field(
        False, description="go back to the last good checkpoint and leave the bad stretch of data out"
    )
    max_rollbacks: Positive = Field(2, description="ways back in one run; then it ends with exit code 5")
    rollback_margin_steps: Count = Field(
        100,
        description="steps before the first bad one that are left out too; PaLM restarted about 100 earlier",
    )
    replica_check_every: Count = Field(
        500, description="steps between comparisons of the ranks' weights, stages 0 to 2; 0 = never"
    )
    collective_seconds: float = Field(
        600.0,
        gt=0.0,
        description="how long a rank waits for the others before it gives up and names the silent one",
    )
    hang_seconds: float = Field(
        300.0,
        gt=0.0,
        description="a step that lasts longer writes the stacks of all threads to the log folder; under Slurm the "
        "guilty rank is then named, all are killed and started again",
    )
    start_seconds: float = Field(
        1800.0,
        gt=0.0,
        description="the same for the start: imports, meeting, loading, the first step with what it compiles",
    )
    save_seconds: float = Field(1800.0, gt=0.0, description="the same for a save")
    evaluate_seconds: float = Field(3600.0, gt=0.0, description="the same for an evaluation and its samples")
    straggler_seconds: float = Field(
        60.0,
        gt=0.0,
        description="how often the supervisor compares how long each rank waits, to name the one that slows all",
    )
    restarts_without_progress: Count = Field(
        1,
        description="starts after a crash, hang or lost node with no newer checkpoint since; then the run ends "
        "with exit code 6",
    )
    allreduce_gib_per_second: float = Field(
        0.0,
        ge=0.0,
        description="expected of the network before the first step, below it is told; 0 = unknown",
    )
    on_event: tuple[str, ...] = Field(
        (),
        description="program and arguments run without a shell when a job is done, failed, stuck or requeued; the "
        "event, the run folder and a line about it come last",
    )
