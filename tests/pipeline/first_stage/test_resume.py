"""Checkpoints: AdamW's state survives to the bit, every kind of damage is found, and two are kept."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.errors import CheckpointError, ConfigError, DataError
from pipeline.first_stage import resume


def save(folder: Path, number: int, network: nn.Module, optimizer: torch.optim.AdamW) -> Path:
    """Save what a learner would."""
    parts = {
        "model": network.state_dict(),
        "optimizer": resume.optimizer_tensors(network, optimizer),
    }
    return resume.save(folder, number, parts, ABOUT)


ABOUT: dict[str, dict[str, Any]] = {"settings": {"seed": 1}, "noted": {"first_loss": 0.5}}


def make(seed: int) -> tuple[nn.Module, torch.optim.AdamW]:
    """Return a network with a channels-last kernel, and AdamW over two groups in another order than the names."""
    torch.manual_seed(seed)
    kernel: Any = nn.Conv2d(3, 4, 3)
    network = nn.Sequential(kernel.to(memory_format=torch.channels_last), nn.Flatten(), nn.Linear(16, 5))
    groups = [
        {"params": [network[2].weight, network[0].weight]},
        {"params": [network[2].bias, network[0].bias]},
    ]
    return network, torch.optim.AdamW(groups, lr=1e-2, fused=True)


def step(network: nn.Module, optimizer: torch.optim.AdamW, number: int) -> None:
    """Take one AdamW step on numbers that depend on `number` alone."""
    images = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(number))
    network(images).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def damage_byte(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    payload = bytearray(path.read_bytes())
    payload[len(payload) // 2] ^= 4
    path.write_bytes(payload)


def test_restored_training_is_the_same_to_the_bit(tmp_path: Path) -> None:
    network, optimizer = make(0)
    for number in range(3):
        step(network, optimizer, number)
    save(tmp_path, 3, network, optimizer)
    other, other_optimizer = make(1)
    saved = resume.newest(tmp_path)
    assert saved is not None and (saved.step, saved.settings, saved.noted) == (
        3,
        {"seed": 1},
        {"first_loss": 0.5},
    )
    parts = resume.load(saved)
    other.load_state_dict(parts["model"])
    resume.restore_optimizer(parts["optimizer"], other, other_optimizer)
    for number in range(3, 9):
        step(network, optimizer, number)
        step(other, other_optimizer, number)
    for left, right in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right) and left.stride() == right.stride()
        ours, theirs = optimizer.state[left], other_optimizer.state[right]
        assert ours["exp_avg"].stride() == theirs["exp_avg"].stride()
        assert all(torch.equal(ours[field], theirs[field]) for field in ("step", "exp_avg", "exp_avg_sq"))
    assert not list(tmp_path.rglob("*.p*t*")), "no pickle"


def test_two_are_kept_and_later_leftovers_go(tmp_path: Path) -> None:
    network, optimizer = make(0)
    step(network, optimizer, 0)
    for number in (10, 20, 30, 25):
        save(tmp_path, number, network, optimizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000020", "step-00000025"]
    assert resume.newest(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: damage_byte(path / "model.safetensors"), "model.safetensors has another sha256"),
        (
            lambda path: damage_byte(path / "optimizer.safetensors"),
            "optimizer.safetensors has another sha256",
        ),
        (lambda path: (path / "model.safetensors").unlink(), "model.safetensors is missing"),
        (
            lambda path: (path / "optimizer.safetensors").write_bytes(b"x"),
            "optimizer.safetensors has 1 bytes",
        ),
        (lambda path: (path / "checkpoint.json").unlink(), "checkpoint.json is missing"),
        (
            lambda path: (path / "checkpoint.json").write_bytes(b"\x00" * 40),
            "checkpoint.json is not readable",
        ),
        (lambda path: (path / "checkpoint.json").write_text("{}"), "checkpoint.json is not readable"),
        (lambda path: edit(path, step=11), "checkpoint.json has another digest"),
        (lambda path: edit(path, format=3), "format 3, this version reads 2"),
    ],
)
def test_damage_is_named_and_the_one_before_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], said: str
) -> None:
    network, optimizer = make(0)
    step(network, optimizer, 0)
    save(tmp_path, 10, network, optimizer)
    damage(save(tmp_path, 20, network, optimizer))
    saved = resume.newest(tmp_path)
    assert saved is not None and saved.step == 10
    assert "step-00000020" in caplog.text and said in caplog.text
    damage(tmp_path / "step-00000010")
    with pytest.raises(CheckpointError, match="no checkpoint is whole: remove") as error:
        resume.newest(tmp_path)
    assert str(error.value).count(said) == 2


def edit(path: Path, **changes: object) -> None:
    """Change entries of the manifest."""
    manifest = json.loads((path / "checkpoint.json").read_text()) | changes
    (path / "checkpoint.json").write_text(json.dumps(manifest))


def test_settings_name_every_field_with_both_values(tmp_path: Path) -> None:
    resume.require_equal_settings({"a": 1, "b": [2]}, {"b": [2], "a": 1}, tmp_path, "it")
    with pytest.raises(ConfigError) as error:
        resume.require_equal_settings(
            {"a": 1, "b": 2, "same": 0}, {"a": 3, "c": 4, "same": 0}, tmp_path, "it"
        )
    assert [problem.split(": ", 1)[1].split(";")[0] for problem in error.value.problems] == [
        "trained with a = 1, this run has 3",
        "trained with b = 2, this run has None",
        "trained with c = None, this run has 4",
    ]


def test_finished_folders(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    assert not resume.is_finished(folder, "report.json", {"a": 1})
    folder.mkdir()
    with pytest.raises(ConfigError, match=r"has no report\.json"):
        resume.is_finished(folder, "report.json", {"a": 1})
    (folder / "report.json").write_text('{"settings": {"a": 1}}')
    assert resume.is_finished(folder, "report.json", {"a": 1})
    (folder / "report.json").write_text('{"settings": 5}')
    with pytest.raises(DataError, match="has no settings"):
        resume.is_finished(folder, "report.json", {"a": 1})
