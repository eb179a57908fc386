"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

import math

from pipeline.config import OptimizerConfig


def learning_rate(optimizer: OptimizerConfig, step: int, total_steps: int) -> float:
    """Return the learning rate of the update that follows `step` finished steps of `total_steps`.

    Linear warm-up whose first update already moves (1 / warmup_steps of the full rate, not 0), then constant,
    half a cosine to 0 at `total_steps`, or sqrt(warmup / step) (Vaswani et al. 2017, section 5.3).
    """
    warmup, peak = optimizer.warmup_steps, optimizer.learning_rate
    update = step + 1
    if update <= warmup:
        return peak * update / warmup
    if optimizer.schedule == "cosine":
        done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        return peak * 0.5 * (1.0 + math.cos(math.pi * done))
    if optimizer.schedule == "inverse_sqrt":
        return peak * math.sqrt(max(warmup, 1) / update)
    return peak
