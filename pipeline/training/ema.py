"""The moving average of the fp32 masters, sharded as they are: no communication, 4 bytes a parameter over all ranks.

One fused update of all fragments. In bf16 an average at decay 0.9999 would stand still: its steps are below half
a unit in the last place.
"""

from typing import Any

import torch
from torch import Tensor

from pipeline.config import EmaConfig
from pipeline.training.fragments import Fragments


def ramped_decay(ema: EmaConfig, updates: int) -> float:
    """Return the decay of the update that follows `updates` earlier ones: min(d, (1 + s) / (10 + s)).

    The ramp lets the average forget the random start within a tenth of any run. Source: latent-diffusion's and
    diffusers' EMA, after TensorFlow's `ExponentialMovingAverage`.
    """
    if not ema.ramp:
        return ema.decay
    return min(ema.decay, (1 + updates) / (10 + updates))


class Ema:
    """The averages of the fragments that this rank owns, in their order."""

    def __init__(self, fragments: Fragments, config: EmaConfig) -> None:
        """Start at the masters as they are."""
        self._masters = [fragment.master for fragment in fragments.owned]
        self._config = config
        self.averages: list[Tensor] = [master.clone() for master in self._masters]
        self.updates = 0

    @property
    def decay(self) -> float:
        """The decay of the last update."""
        return ramped_decay(self._config, max(0, self.updates - 1))

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the masters; only to be called after a step that was applied."""
        weight = 1.0 - ramped_decay(self._config, self.updates)
        if self.averages:
            torch._foreach_lerp_(self.averages, self._masters, weight)
        self.updates += 1

    def to_json(self) -> dict[str, Any]:
        """Return the counters that a checkpoint keeps beside the averages."""
        return {"updates": self.updates, "decay": self._config.decay, "ramp": self._config.ramp}

    def load_json(self, saved: dict[str, Any]) -> None:
        """Take up the count of updates; decay and ramp are the present config's."""
        self.updates = int(saved["updates"])
