"""The learning rate's shape, and which parameters decay."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from torch import nn

from pipeline.errors import ConfigError
from pipeline.first_stage import stage

RECIPE = stage.Recipe(
    kind="autoencoder",
    batch=4,
    steps=100,
    warmup_steps=10,
    learning_rate=2.0,
    betas=(0.9, 0.99),
    weight_decay=0.1,
    clip_grad_norm=1.0,
    checkpoint_every=10,
    log_every=10,
)


def test_learning_rate_warms_up_then_falls_to_zero() -> None:
    rates = [stage.learning_rate_factor(RECIPE, step) for step in range(100)]
    assert rates[:11] == pytest.approx([0.1 * (step + 1) for step in range(10)] + [1.0])
    assert rates[55] == pytest.approx(0.5)
    assert 0.0 < rates[99] < 1e-3 and all(before > after for before, after in pairwise(rates[10:]))
    plain = dataclasses.replace(RECIPE, warmup_steps=0)
    assert stage.learning_rate_factor(plain, 0) == 1.0
    short = dataclasses.replace(RECIPE, steps=5)
    assert stage.learning_rate_factor(short, 4) == pytest.approx(0.5)


def test_only_matrices_and_kernels_decay() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Linear(4, 4))
    optimizer = stage.adamw(network, dataclasses.replace(RECIPE, weight_decay=0.1))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decay[id(p)] for name, p in network.named_parameters()} == {
        "0.weight": 0.1,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
        "2.weight": 0.1,
        "2.bias": 0.0,
    }
    assert optimizer.defaults["betas"] == (0.9, 0.99)


def test_processes_must_divide_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = stage.start_accelerator(7, "first_stage.clip.batch")
    assert accelerator.num_processes == 1 and accelerator.device == torch.device(accelerator.device.type)
    monkeypatch.setattr(type(accelerator), "num_processes", property(lambda self: 4))
    with pytest.raises(ConfigError, match=r"first_stage\.clip\.batch 7 is not a multiple of the 4 processes"):
        stage.start_accelerator(7, "first_stage.clip.batch")
