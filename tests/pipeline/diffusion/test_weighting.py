"""Loss weights against published numbers, against each other, and at the two ends of the schedule."""

import pytest
import torch

from pipeline.config import ObjectiveConfig
from pipeline.diffusion.objective import Prediction, target, training_weight, x0_from_prediction
from pipeline.diffusion.schedule import Schedule, add_noise
from pipeline.diffusion.weighting import Weighting

# min(SNR, 5) / SNR over Stable Diffusion's schedule, and the same over SNR + 1 for v, computed in float64.
MIN_SNR = {0: (0.00425362, 0.00425), 100: (0.59144344, 0.52888261), 249: (1, 0.67543241), 999: (1, 0.0046601)}
WEIGHTINGS: tuple[Weighting, ...] = ("min_snr", "soft_min_snr", "debiased")
T = torch.arange(1000)


def weights(**fields: object) -> torch.Tensor:
    objective = ObjectiveConfig.model_validate(fields)
    return training_weight(objective, Schedule.from_config(objective), T, 8, 8).double()


def test_min_snr_has_the_published_values() -> None:
    epsilon = weights(weighting="min_snr")
    v = weights(weighting="min_snr", prediction="v_prediction")
    for t, (of_epsilon, of_v) in MIN_SNR.items():
        assert epsilon[t].item() == pytest.approx(of_epsilon, rel=1e-4)
        assert v[t].item() == pytest.approx(of_v, rel=1e-4)
    assert epsilon.mean().item() == pytest.approx(0.9165707909, rel=1e-5)
    assert v.mean().item() == pytest.approx(0.2943304677, rel=1e-5)
    assert (epsilon < 1.0).nonzero().max().item() == 146, "SNR falls below 5 at t = 147"
    snr = Schedule.from_config(ObjectiveConfig()).snr()
    x0 = weights(weighting="min_snr", prediction="x0")
    torch.testing.assert_close(x0, snr.clamp(max=5.0), rtol=1e-3, atol=0)


def test_without_a_weighting_every_prediction_counts_as_it_is() -> None:
    for prediction in ("epsilon", "v_prediction", "x0", "flow"):
        assert torch.equal(weights(prediction=prediction), torch.ones(1000, dtype=torch.float64))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "x0"])
def test_a_weighting_means_the_same_for_every_prediction(
    weighting: Weighting, prediction: Prediction
) -> None:
    """A given wrong x0 costs the same whether it was said as noise, as v or as x0."""
    schedule, times = Schedule.from_config(ObjectiveConfig()), torch.tensor([3, 200, 600, 990])
    alpha, sigma = (part.double() for part in schedule.alpha_sigma(times))
    generator = torch.Generator().manual_seed(0)
    x0, noise, wrong = (torch.randn(4, 2, 3, 3, generator=generator).double() for _ in range(3))
    z = add_noise(x0, noise, alpha, sigma)
    said_noise = (z - alpha.view(-1, 1, 1, 1) * wrong) / sigma.view(-1, 1, 1, 1)
    said = target(prediction, wrong, said_noise, alpha, sigma)
    assert torch.allclose(x0_from_prediction(prediction, said, z, alpha, sigma), wrong)
    error = (said - target(prediction, x0, noise, alpha, sigma)).square().flatten(1).mean(1)
    cost = weights(weighting=weighting, prediction=prediction)[times] * error
    of_x0 = weights(weighting=weighting, prediction="x0")[times] * (wrong - x0).square().flatten(1).mean(1)
    torch.testing.assert_close(cost, of_x0, rtol=1e-3, atol=0)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_pure_noise_has_a_finite_weight(weighting: Weighting) -> None:
    """SNR 0, where min(SNR, gamma) / SNR as it is usually written is 0 / 0."""
    for prediction in ("v_prediction", "x0"):
        found = weights(weighting=weighting, prediction=prediction, zero_terminal_snr=True)
        assert torch.isfinite(found).all() and found[999].item() == pytest.approx(0.0, abs=1e-6)
    flow = weights(weighting=weighting, prediction="flow")
    assert torch.isfinite(flow).all() and flow[999].item() == 0.0


def test_soft_min_snr_touches_min_snr_at_both_ends() -> None:
    hard, soft = weights(weighting="min_snr"), weights(weighting="soft_min_snr")
    assert (soft <= hard).all() and soft[999] / hard[999] > 0.99 and soft[0] / hard[0] > 0.99
    assert soft[147].item() == pytest.approx(0.5, abs=0.01), "half where SNR is gamma"
