"""The moving averages of the fp32 masters, sharded as they are: no communication, 4 bytes a parameter over all ranks.

One fused update of all fragments for each average. In bf16 an average at decay 0.9999 would stand still: its
steps are below half a unit in the last place.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline.config import EmaConfig
from pipeline.errors import ConfigError
from pipeline.training.averages.posthoc import gamma_of
from pipeline.training.fragments import Fragment, Fragments

MAIN = "ema"
POSTHOC = "ema-posthoc-"


def ramp_ceiling(ramp: str, updates: int) -> float:
    """Return the largest decay that a ramp allows to the update that follows `updates` earlier ones.

    Source: "ldm" (1 + s) / (10 + s): latent-diffusion's and diffusers' EMA, after TensorFlow's
    `ExponentialMovingAverage`; "power" 1 - (1 + s)^(-2/3): k-diffusion's `EMAWarmup`.
    """
    if ramp == "ldm":
        return (1 + updates) / (10 + updates)
    if ramp == "power":
        return 1.0 - float((1 + updates) ** (-2 / 3))
    return 1.0


def ramped_decay(ema: EmaConfig, updates: int) -> float:
    """Return the decay of the main average in the applied step that follows `updates` earlier ones.

    The ramp lets the average forget the random start within a tenth of any run.
    """
    return min(ema.decay, ramp_ceiling(ema.ramp, updates))


class Profile(Protocol):
    """How an average weighs the past."""

    def kept(self, updates: int, count: int) -> float:
        """Return the part of the average that stays at an update after `updates` applied steps, `count` after the last."""
        ...


@dataclass(frozen=True)
class Exponential:
    """A constant decay a step after the ramp; rarer updates keep the same time scale."""

    decay: float
    ramp: str

    def kept(self, updates: int, count: int) -> float:
        """Return the product of the decays of the `count` steps since the last update."""
        steps = range(updates - count, updates)
        return math.prod(min(self.decay, ramp_ceiling(self.ramp, step)) for step in steps)


@dataclass(frozen=True)
class PowerFunction:
    """Weights that grow with (t / T)^gamma: the average is always the same part of the training long.

    Source: Karras et al. 2023, "Analyzing and Improving the Training Dynamics of Diffusion Models", eq. 4.
    """

    sigma_rel: float

    def kept(self, updates: int, count: int) -> float:
        """Return (1 - count / updates)^(gamma + 1): 0 at the first update, so the start leaves no trace."""
        return float((1.0 - count / updates) ** (gamma_of(self.sigma_rel) + 1.0))


def profiles_of(config: EmaConfig) -> dict[str, Profile]:
    """Return the profile of every configured average by kind: "ema", "ema-0.999", "ema-posthoc-0.05"."""
    profiles: dict[str, Profile] = {MAIN: Exponential(config.decay, config.ramp)}
    profiles |= {f"{MAIN}-{decay}": Exponential(decay, config.ramp) for decay in config.more_decays}
    widths = config.posthoc.sigma_rel if config.posthoc else ()
    return profiles | {f"{POSTHOC}{width}": PowerFunction(width) for width in widths}


class Ema:
    """All averages of the fragments that this rank owns, in their order."""

    def __init__(self, fragments: Fragments, config: EmaConfig) -> None:
        """Start at the masters as they are."""
        self._owned = fragments.owned
        self._masters = [fragment.master for fragment in self._owned]
        self._config, self._profiles = config, profiles_of(config)
        self._tensors = {kind: [master.clone() for master in self._masters] for kind in self._profiles}
        self._fresh: frozenset[str] = frozenset()
        self.updates = 0
        """Applied steps seen."""
        self.averaged = 0
        """Applied steps at the last update; behind `updates` only where `ema.every` is above 1."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The names of the averages, "ema" first."""
        return tuple(self._profiles)

    @property
    def averages(self) -> list[Tensor]:
        """The fragments of the main average, live."""
        return self._tensors[MAIN]

    @property
    def decay(self) -> float:
        """The main average's decay in the last applied step."""
        return ramped_decay(self._config, max(0, self.updates - 1))

    def held(self, *, to_load: bool = False) -> Iterator[tuple[str, Fragment, Tensor]]:
        """Yield (kind, the fragment averaged, its average) for all that a checkpoint keeps.

        With `to_load`, what the checkpoint told to `load_json` does not hold is left out.
        """
        for kind, tensors in self._tensors.items():
            if not (to_load and kind in self._fresh):
                for fragment, average in zip(self._owned, tensors, strict=True):
                    yield kind, fragment, average

    def of_kind(self, kind: str) -> list[Tensor]:
        """Return the fragments of one average, live, in the order of the owned fragments."""
        return self._tensors[kind]

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the masters; only to be called after a step that was applied."""
        self.updates += 1
        if self.updates % self._config.every:
            return
        count, self.averaged = self.updates - self.averaged, self.updates
        for kind, profile in self._profiles.items():
            weight = 1.0 - profile.kept(self.updates, count)
            if self._masters:
                torch._foreach_lerp_(self._tensors[kind], self._masters, weight)

    def to_json(self) -> dict[str, Any]:
        """Return the counters that a checkpoint keeps beside the averages, and which averages those are."""
        return {"updates": self.updates, "averaged": self.averaged, "kinds": list(self.kinds)}

    def load_json(self, saved: Mapping[str, Any]) -> list[str]:
        """Take up the counters before the tensors are read; return a line for each average that begins or ends here.

        Raises:
            ConfigError: a power-function average is asked for that did not run from the start: it would be wrong.
        """
        self.updates, self.averaged = int(saved["updates"]), int(saved.get("averaged", saved["updates"]))
        there = set(saved.get("kinds", [MAIN]))  # Checkpoints of format 1 say neither and hold one.
        fresh = [kind for kind in self.kinds if kind not in there]
        late = [kind for kind in fresh if kind.startswith(POSTHOC) and self.updates]
        if late:
            raise ConfigError(
                f"ema.posthoc: {', '.join(late)} would begin after {self.updates} of the run's steps, but such an "
                f"average spans them all; the checkpoint holds {', '.join(sorted(there))}; take those widths, remove "
                "ema.posthoc, or use another run name"
            )
        self._fresh = frozenset(fresh)
        dropped = sorted(there - set(self.kinds))
        begun = [
            f"ema: the checkpoint holds no {kind}; it begins now, at the present masters" for kind in fresh
        ]
        return begun + [f"ema: {kind} is no longer configured and not kept" for kind in dropped]

    @torch.no_grad()
    def loaded(self) -> None:
        """Finish a load: what the checkpoint did not hold begins at the masters that were just read."""
        for kind in self._fresh:
            for average, master in zip(self._tensors[kind], self._masters, strict=True):
                average.copy_(master)
        self._fresh = frozenset()
