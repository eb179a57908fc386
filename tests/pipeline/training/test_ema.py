"""The moving average against published values of the ramp and the closed form."""

import pytest
import torch

from pipeline.config import EmaConfig
from pipeline.training.ema import Ema, ramped_decay
from tests.pipeline.training.stand_ins import StandInFragments


@pytest.mark.parametrize(
    ("updates", "decay"),
    [(2, 0.18181818), (10, 0.52631579), (100, 0.91743119), (1000, 0.99108028), (10000, 0.99910081)],
)
def test_the_ramp_has_the_values_of_diffusers(updates: int, decay: float) -> None:
    """diffusers' EMAModel.get_decay(updates), which counts from the update before."""
    config = EmaConfig(decay=0.9999)
    assert ramped_decay(config, updates - 1) == pytest.approx(decay, abs=5e-9)


def test_the_ramp_ends_at_the_decay_and_can_be_off() -> None:
    assert ramped_decay(EmaConfig(decay=0.9), 10**6) == 0.9
    assert ramped_decay(EmaConfig(decay=0.9, ramp=False), 0) == 0.9


def test_constant_decay_towards_constant_weights_is_the_closed_form() -> None:
    """w - (w - w0) d^n after n updates."""
    fragments = StandInFragments()
    ema = Ema(fragments, EmaConfig(decay=0.9, ramp=False))  # type: ignore[arg-type]
    start = [average.double() for average in ema.averages]
    for fragment in fragments.owned:
        fragment.master.add_(1.0)
    for _ in range(25):
        ema.update()
    for first, fragment, average in zip(start, fragments.owned, ema.averages, strict=True):
        now = fragment.master.double()
        torch.testing.assert_close(average.double(), now - (now - first) * 0.9**25, rtol=1e-6, atol=1e-6)


def test_the_average_is_a_copy_and_the_masters_stay() -> None:
    fragments = StandInFragments()
    ema = Ema(fragments, EmaConfig())  # type: ignore[arg-type]
    before = [fragment.master.clone() for fragment in fragments.owned]
    ema.averages[0].zero_()
    ema.update()
    assert all(torch.equal(a, b.master) for a, b in zip(before, fragments.owned, strict=True))


def test_counters_survive_and_the_decay_shown_is_the_one_used() -> None:
    fragments = StandInFragments()
    ema = Ema(fragments, EmaConfig(decay=0.9999))  # type: ignore[arg-type]
    for _ in range(10):
        ema.update()
    assert ema.decay == pytest.approx(0.52631579)
    other = Ema(fragments, EmaConfig(decay=0.9999))  # type: ignore[arg-type]
    other.load_json(ema.to_json())
    assert other.updates == 10 and other.decay == ema.decay
