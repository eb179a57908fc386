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
        600.0,
        gt=0.0,
        description="a step that lasts longer writes the stacks of all threads to the log folder",
    )
