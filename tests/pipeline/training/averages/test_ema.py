"""The moving averages against published values of the ramps, closed forms, and a dense sum of all past weights."""

import json

import numpy as np
import pytest
import torch

from pipeline.config import EmaConfig
from pipeline.errors import ConfigError
from pipeline.training.averages.ema import Ema, ramp_ceiling, ramped_decay
from pipeline.training.averages.posthoc import gamma_of
from tests.pipeline.training.stand_ins import StandInFragments


def config(**fields: object) -> EmaConfig:
    return EmaConfig.model_validate_json(json.dumps({"ramp": "none", **fields}))


def averages_of(fragments: StandInFragments, **fields: object) -> Ema:
    return Ema(fragments, config(**fields))  # type: ignore[arg-type]


def walk(fragments: StandInFragments, ema: Ema, steps: int) -> np.ndarray:
    """Take steps that move every element, with an update after each; return element 0 after each, float64 [steps]."""
    values = []
    for step in range(steps):
        for fragment in fragments.owned:
            fragment.master.add_(np.sin(step + 1.0))
        ema.update()
        values.append(float(fragments.owned[0].master[0]))
    return np.array(values)


@pytest.mark.parametrize(
    ("updates", "decay"),
    [(2, 0.18181818), (10, 0.52631579), (100, 0.91743119), (1000, 0.99108028), (10000, 0.99910081)],
)
def test_the_ldm_ramp_has_the_values_of_diffusers(updates: int, decay: float) -> None:
    """diffusers' EMAModel.get_decay(updates), which counts from the update before."""
    assert ramped_decay(config(ramp="ldm"), updates - 1) == pytest.approx(decay, abs=5e-9)


@pytest.mark.parametrize(("updates", "ceiling"), [(1000, 0.99), (10000, 0.99784557)])
def test_the_power_ramp_has_the_values_of_k_diffusion(updates: int, ceiling: float) -> None:
    """k-diffusion's EMAWarmup with its power of 2/3: 0.99 at 1000 (1 - 1001^(-2/3) = 0.990007)."""
    assert ramp_ceiling("power", updates) == pytest.approx(ceiling, abs=1e-5)


def test_a_ramp_ends_at_the_decay_and_can_be_off() -> None:
    for ramp in ("ldm", "power"):
        assert ramped_decay(config(decay=0.9, ramp=ramp), 10**6) == 0.9
    assert ramped_decay(config(decay=0.9), 0) == 0.9


def test_the_ramp_of_the_first_checkpoints_is_understood() -> None:
    assert config(ramp=True).ramp == "ldm" and config(ramp=False).ramp == "none"


def test_constant_decay_towards_constant_weights_is_the_closed_form() -> None:
    """w - (w - w0) d^n after n updates."""
    fragments = StandInFragments()
    ema = averages_of(fragments, decay=0.9)
    start = [average.double() for average in ema.averages]
    for fragment in fragments.owned:
        fragment.master.add_(1.0)
    for _ in range(25):
        ema.update()
    for first, fragment, average in zip(start, fragments.owned, ema.averages, strict=True):
        now = fragment.master.double()
        torch.testing.assert_close(average.double(), now - (now - first) * 0.9**25, rtol=1e-6, atol=1e-6)


def test_an_average_moves_where_one_in_bf16_stands_still() -> None:
    """From 0.9 towards 1.0 at decay 0.9999: 1 - 0.1 * 0.9999^20000 = 0.98647; a bf16 average stays at 0.8984."""
    fragments = StandInFragments(shapes={"w": (1,)})
    master = fragments.owned[0].master.fill_(0.9)
    ema = averages_of(fragments, decay=0.9999)
    in_bf16, target = master.bfloat16(), torch.ones(1, dtype=torch.bfloat16)
    master.fill_(1.0)
    for _ in range(20_000):
        ema.update()
        in_bf16.lerp_(target, 1e-4)
    assert ema.averages[0].item() == pytest.approx(1 - 0.1 * 0.9999**20_000, abs=2e-5)
    assert in_bf16.item() == pytest.approx(0.8984, abs=1e-4)


def test_averages_are_fp32_of_the_masters_whatever_the_weights_are() -> None:
    """A peer's average stays where it began when weights and averages differ in type: its update goes to a copy."""
    fragments = StandInFragments()
    ema = averages_of(fragments, decay=0.9)
    addresses = [average.data_ptr() for average in ema.averages]
    walk(fragments, ema, 50)
    assert [average.data_ptr() for average in ema.averages] == addresses
    assert all(average.dtype == torch.float32 for average in ema.averages)
    assert not any(
        torch.equal(average, StandInFragments().owned[n].master) for n, average in enumerate(ema.averages)
    )


@pytest.mark.parametrize("ramp", ["none", "ldm", "power"])
def test_rarer_updates_keep_the_time_scale(ramp: str) -> None:
    """Towards constant weights, an update every 4 steps is where an update at every step is: decays multiply."""
    often_of, rarely_of = StandInFragments(), StandInFragments()
    often = averages_of(often_of, decay=0.97, ramp=ramp)
    rarely = averages_of(rarely_of, decay=0.97, ramp=ramp, every=4)
    for fragments in (often_of, rarely_of):
        for fragment in fragments.owned:
            fragment.master.mul_(3.0)
    for _ in range(40):
        often.update()
        rarely.update()
    for one, other in zip(often.averages, rarely.averages, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-6)


def test_between_updates_nothing_moves() -> None:
    fragments = StandInFragments()
    ema = averages_of(fragments, decay=0.5, every=3)
    before = ema.averages[0].clone()
    walk(fragments, ema, 2)
    assert torch.equal(ema.averages[0], before) and (ema.updates, ema.averaged) == (2, 0)
    walk(fragments, ema, 1)
    assert not torch.equal(ema.averages[0], before) and (ema.updates, ema.averaged) == (3, 3)


def test_several_averages_are_each_what_one_alone_would_be() -> None:
    fragments = StandInFragments()
    decays = [0.5, 0.9]
    ema = averages_of(fragments, decay=0.99, more_decays=decays)
    alone_of = [StandInFragments() for _ in decays]
    alone = [averages_of(of, decay=decay) for of, decay in zip(alone_of, decays, strict=True)]
    walk(fragments, ema, 10)
    for of, single, decay in zip(alone_of, alone, decays, strict=True):
        walk(of, single, 10)
        pairs = zip(ema.of_kind(f"ema-{decay}"), single.averages, strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.10, 0.25])
@pytest.mark.parametrize("every", [1, 5])
def test_a_power_function_average_weighs_the_past_by_its_power(sigma_rel: float, every: int) -> None:
    """Dense oracle: weights of the past from the products of all later factors; they approach t^gamma."""
    steps, gamma = 200, gamma_of(sigma_rel)
    fragments = StandInFragments()
    ema = averages_of(fragments, every=every, posthoc={"sigma_rel": [sigma_rel], "snapshot_every": 1})
    values = walk(fragments, ema, steps)[every - 1 :: every]
    times = np.arange(every, steps + 1, every, dtype=np.float64)
    kept = (1.0 - every / times) ** (gamma + 1)
    weights = np.array([(1 - kept[k]) * np.prod(kept[k + 1 :]) for k in range(len(times))])
    assert weights.sum() == pytest.approx(1.0, abs=1e-12)
    # Each factor is the share of the integral of t^gamma up to the step before.
    exact = (times ** (gamma + 1) - (times - every) ** (gamma + 1)) / steps ** (gamma + 1)
    assert weights == pytest.approx(exact, abs=1e-12)
    average = float(ema.of_kind(f"ema-posthoc-{sigma_rel}")[0][0])
    assert average == pytest.approx(float(weights @ values), abs=2e-5)


def test_the_average_is_a_copy_and_the_masters_stay() -> None:
    fragments = StandInFragments()
    ema = averages_of(fragments)
    before = [fragment.master.clone() for fragment in fragments.owned]
    ema.averages[0].zero_()
    ema.update()
    assert all(torch.equal(a, b.master) for a, b in zip(before, fragments.owned, strict=True))


@pytest.mark.covers("F38")
def test_counters_survive_and_the_decay_shown_is_the_one_used() -> None:
    fragments = StandInFragments()
    ema = averages_of(fragments, decay=0.9999, ramp="ldm", every=3)
    for _ in range(10):
        ema.update()
    assert ema.decay == pytest.approx(0.52631579)
    other = averages_of(fragments, decay=0.9999, ramp="ldm", every=3)
    assert other.load_json(json.loads(json.dumps(ema.to_json()))) == []
    assert (other.updates, other.averaged, other.decay) == (10, 9, ema.decay)


@pytest.mark.covers("F38")
def test_an_average_that_the_checkpoint_lacks_begins_at_the_masters_and_says_so() -> None:
    fragments = StandInFragments()
    saved = averages_of(fragments, more_decays=[0.5]).to_json() | {"updates": 7, "averaged": 7}
    ema = averages_of(fragments, more_decays=[0.9])
    lines = ema.load_json(saved)
    assert [line.split()[1:5] for line in lines] == [
        ["the", "checkpoint", "holds", "no"],
        ["ema-0.5", "is", "no", "longer"],
    ]
    assert {kind for kind, _, _ in ema.held(to_load=True)} == {"ema"}
    assert {kind for kind, _, _ in ema.held()} == {"ema", "ema-0.9"}
    fragments.step()  # What loading does to the masters.
    ema.loaded()
    assert all(
        torch.equal(average, fragment.master)
        for average, fragment in zip(ema.of_kind("ema-0.9"), fragments.owned, strict=True)
    )
    assert not torch.equal(ema.averages[0], fragments.owned[0].master)


@pytest.mark.covers("F38")
def test_an_average_over_the_whole_run_cannot_begin_in_its_midst() -> None:
    fragments = StandInFragments()
    saved = averages_of(fragments).to_json() | {"updates": 7, "averaged": 7}
    late = averages_of(fragments, posthoc={"snapshot_every": 5})
    with pytest.raises(
        ConfigError, match=r"ema-posthoc-0.05, ema-posthoc-0.1 would begin after 7 .* holds ema;"
    ):
        late.load_json(saved)
    assert len(late.load_json(saved | {"updates": 0, "averaged": 0})) == 2  # Nothing was averaged yet.


def test_checkpoints_of_format_1_hold_one_average() -> None:
    ema = averages_of(StandInFragments())
    assert ema.load_json({"updates": 4, "decay": 0.9, "ramp": True}) == []
    assert (ema.updates, ema.averaged) == (4, 4)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"decay": 1.0}, "less than 1"),
        ({"decay": 0.0}, "greater than 0"),
        ({"more_decays": [0.9999]}, "same value twice"),
        ({"posthoc": {"snapshot_every": 5, "sigma_rel": [0.1, 0.1]}}, "same value twice"),
        ({"posthoc": {"snapshot_every": 5, "sigma_rel": [0.29]}}, "less than 0.28"),
        ({"posthoc": {"snapshot_every": 5, "sigma_rel": []}}, "at least 1 item"),
        ({"every": 0}, "greater than or equal to 1"),
    ],
)
def test_wrong_settings_are_refused(fields: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        config(**fields)
