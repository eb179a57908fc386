"""Draws are pure functions of (seed, k, purpose), with the distributions they promise."""

import numpy as np
import pytest

from pipeline.config import ObjectiveConfig
from pipeline.diffusion import draws
from pipeline.diffusion.draws import Purpose


def test_the_same_place_gives_the_same_bits_and_no_other_does() -> None:
    base = draws.normal(3, 17, Purpose.NOISE, (4, 8, 8))
    assert base.dtype == np.float32 and np.array_equal(base, draws.training_noise(3, 17, shape=(4, 8, 8)))
    for other in ((4, 17, Purpose.NOISE), (3, 18, Purpose.NOISE), (3, 17, Purpose.POSTERIOR)):
        assert abs(np.corrcoef(base.ravel(), draws.normal(*other, (4, 8, 8)).ravel())[0, 1]) < 0.25
    first = draws.normal(0, 0, Purpose.NOISE, (2,))
    assert first == pytest.approx([2.4439878463745117, 0.46205928921699524]), (
        "a new stream would change every run"
    )


def test_noise_is_standard_normal_and_positions_do_not_overlap() -> None:
    values = np.concatenate([draws.training_noise(0, k, shape=(4, 16, 16)).ravel() for k in range(100)])
    assert values.mean() == pytest.approx(0, abs=0.01) and values.std() == pytest.approx(1, abs=0.01)
    assert len(np.unique(values)) > 0.99 * len(values)


def test_stratified_timesteps_cover_each_batch_and_stay_uniform() -> None:
    objective = ObjectiveConfig(timestep_draw="stratified")
    for batch in range(20):
        t = [draws.timestep(1, k, objective, 10) for k in range(batch * 10, batch * 10 + 10)]
        assert [value // 100 for value in t] == list(range(10))
    uniform = ObjectiveConfig(timestep_draw="uniform")
    t = [draws.timestep(1, k, uniform, 10) for k in range(5000)]
    assert np.mean(t) == pytest.approx(499.5, abs=15) and 0 <= min(t) and max(t) <= 999


def test_dropout_and_caption_choice_have_their_share() -> None:
    dropped = [draws.drops_caption(0, k, 0.1) for k in range(5000)]
    assert np.mean(dropped) == pytest.approx(0.1, abs=0.015)
    assert not any(draws.drops_caption(0, k, 0.0) for k in range(200))
    assert all(draws.drops_caption(0, k, 1.0) for k in range(200))
    counts = np.bincount([draws.caption_choice(0, k, 3) for k in range(3000)])
    assert len(counts) == 3 and counts.min() > 900
