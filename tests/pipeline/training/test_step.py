"""A step hands both noises of a batch to the loss, each in its place."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config import ObjectiveConfig
from pipeline.data.batch import LatentBatch
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.schedule import Schedule
from pipeline.training.step import TrainStep

T, X0 = 400, 0.5


def batch(**noise: Tensor) -> LatentBatch:
    """One sample whose posterior has no spread, so that x0 is X0 everywhere."""
    mean = torch.full((1, 1, 2, 2), X0)
    return LatentBatch(
        moments=torch.cat([mean, torch.full_like(mean, -30.0)], dim=1),
        text=None,
        tokens=torch.zeros(1, 1, dtype=torch.int64),
        posterior_noise=torch.zeros(1, 1, 2, 2),
        timesteps=torch.tensor([T]),
        dropped=torch.tensor([False]),
        weight=torch.ones(1),
        positions=torch.zeros(1, dtype=torch.int64),
        indices=torch.zeros(1, dtype=torch.int64),
        **noise,
    )


@pytest.mark.parametrize("perturbed", [False, True])
def test_the_input_has_the_input_noise_and_the_target_has_not(perturbed: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    noise, extra = (torch.randn(1, 1, 2, 2, generator=generator) for _ in range(2))
    objective = ObjectiveConfig(input_perturbation=0.3 * perturbed)
    seen: list[Tensor] = []

    def network(z_BCHW: Tensor, *_: Any) -> Tensor:
        seen.append(z_BCHW)
        return torch.zeros_like(z_BCHW)

    network.backward = lambda loss: None  # type: ignore[attr-defined]
    config: Any = SimpleNamespace(objective=objective, seed=0, engine=SimpleNamespace(global_batch=1))
    world: Any = SimpleNamespace(device=torch.device("cpu"), world_size=1, rank=0)
    spec: Any = SimpleNamespace(scaling_factor=1.0, shift_factor=0.0)
    text: Any = SimpleNamespace(conditions=lambda _: Conditioning(torch.zeros(1, 1, 1)))
    mixed = noise + 0.3 * extra if perturbed else noise
    given = {"noise": noise, "input_noise": mixed} if perturbed else {"noise": noise}
    losses = TrainStep(config, world, network, spec, text).accumulate([batch(**given)], step=1)  # type: ignore[arg-type]

    alpha_1, sigma_1 = Schedule.from_config(objective, "cpu").alpha_sigma(torch.tensor([T]))
    assert torch.allclose(seen[0], alpha_1 * X0 + sigma_1 * mixed, atol=1e-5)
    assert losses.total.item() == pytest.approx(noise.square().mean().item(), rel=1e-5)
