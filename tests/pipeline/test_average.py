"""Averages made after the training: against averages of that length tracked all along, and what is refused."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pipeline.average import WEIGHTS_NAME, combined_weights, made_weights, reconstruct
from pipeline.config import EmaConfig
from pipeline.errors import CheckpointError, ConfigError
from pipeline.generate import Generator
from pipeline.paths import RunPaths
from pipeline.publish import file_digest, write_json
from pipeline.training.averages import snapshots as snapshots_module
from pipeline.training.averages.ema import Ema
from pipeline.training.averages.snapshots import Snapshots, usable_snapshots
from pipeline.training.saving.manifest import seal
from pipeline.training.world import World
from tests.builders import TinyRun, tiny_run
from tests.pipeline.training.stand_ins import StandInFragments, stand_in_checkpoints

STEPS, EVERY = 240, 40
TRACKED = (0.05, 0.07, 0.10, 0.15)


def ema_config(widths: tuple[float, ...], every: int = EVERY) -> EmaConfig:
    tree = {"decay": 0.9, "posthoc": {"sigma_rel": list(widths), "snapshot_every": every}}
    return EmaConfig.model_validate_json(json.dumps(tree))


@dataclass
class Training:
    """A run of stand-ins with snapshots of two widths, and averages of more widths tracked directly."""

    paths: RunPaths
    fragments: StandInFragments
    ema: Ema
    direct: Ema
    snapshots: Snapshots

    def go(self, steps: range, snapshots: bool = True) -> None:
        """Walk at random, the same way at every call for the same steps; a checkpoint at the end."""
        for step in steps:
            draw = torch.Generator().manual_seed(step)
            for fragment in self.fragments.owned:
                fragment.master.add_(torch.randn(fragment.master.shape, generator=draw), alpha=0.1)
            self.fragments.updates += 1
            self.ema.update()
            self.direct.update()
            if snapshots and (step + 1) % EVERY == 0:
                assert self.snapshots.save(step + 1, 4 * (step + 1))

    def tracked(self, width: float) -> dict[str, torch.Tensor]:
        averages = self.direct.of_kind(f"ema-posthoc-{width}")
        shapes = self.fragments.shapes.items()
        return {name: average.view(shape) for (name, shape), average in zip(shapes, averages, strict=True)}


def begin(root: Path, attempt: str = "a1") -> Training:
    paths, fragments = RunPaths(root), StandInFragments()
    checkpoints, _ = stand_in_checkpoints(paths.checkpoints, fragments, attempt=attempt)
    checkpoints.fence.take()
    (paths.checkpoints / f"step-{STEPS:08d}").mkdir(exist_ok=True)  # Only its name is asked for.
    ema = Ema(fragments, ema_config((0.05, 0.10)))  # type: ignore[arg-type]
    snapshots = Snapshots(
        paths.averages,
        world=World(),
        fragments=fragments,  # type: ignore[arg-type]
        ema=ema,
        facts={"attempt": attempt, "config": {}, "data_digest": "d"},
        fence=checkpoints.fence,
    )
    return Training(paths, fragments, ema, Ema(fragments, ema_config(TRACKED)), snapshots)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Training:
    training = begin(tmp_path_factory.mktemp("run"))
    training.go(range(STEPS))
    return training


@pytest.fixture
def training(whole: Training, tmp_path: Path) -> Training:
    """A copy of the run that a test may damage."""
    shutil.copytree(whole.paths.root, tmp_path / "run")
    return Training(RunPaths(tmp_path / "run"), whole.fragments, whole.ema, whole.direct, whole.snapshots)


def distance(made: dict[str, torch.Tensor], tracked: dict[str, torch.Tensor]) -> float:
    """Return the largest difference as a part of the tracked average's size."""
    assert made.keys() == tracked.keys()
    return max(float((made[key] - tracked[key]).abs().max() / tracked[key].abs().max()) for key in made)


@pytest.mark.parametrize(("width", "allowed"), [(0.05, 1e-6), (0.10, 1e-6), (0.07, 0.01), (0.15, 0.02)])
def test_the_average_made_is_the_one_tracked_all_along(
    training: Training, width: float, allowed: float
) -> None:
    """Stored widths to fp32 rounding, others to the error of the profile's fit, over a random walk of 240 steps."""
    folder = reconstruct(training.paths, width)
    record, weights = made_weights(folder)
    error = distance(weights, training.tracked(width))
    print(f"sigma_rel {width}: off by {error:.2e} of the average, profile by {record['profile_error']:.2e}")
    assert error < allowed
    assert folder == training.paths.weights / f"posthoc-{width}-step-00000240"
    assert (record["step"], record["samples"], record["sigma_rel"]) == (STEPS, 4 * STEPS, width)
    assert len(record["factors"]) == 2 * STEPS // EVERY


def test_the_wrong_width_is_not_the_one_tracked(training: Training) -> None:
    """The test above can fail: neighbouring widths are far apart on a random walk."""
    _, weights = made_weights(reconstruct(training.paths, 0.05))
    assert distance(weights, training.tracked(0.15)) > 0.05


def test_an_earlier_step_is_made_of_what_was_there_then(training: Training) -> None:
    early = begin(training.paths.root.parent / "early")
    early.go(range(160))
    record, weights = made_weights(reconstruct(training.paths, 0.10, 160))
    assert distance(weights, early.tracked(0.10)) < 1e-6
    assert {name for name, _, _ in record["factors"]} == {f"step-{step:08d}" for step in (40, 80, 120, 160)}


def test_the_sum_is_a_dense_float64_sum(training: Training) -> None:
    snapshots = usable_snapshots(training.paths.averages, STEPS)
    from_record, weights = made_weights(reconstruct(training.paths, 0.12))
    expected = np.zeros((4, 3))
    for name, kind, factor in from_record["factors"]:
        (folder,) = [folder for folder, _ in snapshots if folder.name == name]
        expected += factor * stored(folder, kind)["layer.weight"].double().numpy()
    assert np.array_equal(weights["layer.weight"].numpy(), expected.astype(np.float32))


def stored(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """Return one average of a snapshot of one rank, read by stock safetensors."""
    with safe_open(folder / "rank-00000.safetensors", framework="pt") as file:
        return {
            "layer.weight": file.get_tensor(f"{kind}/layer.weight/0").view(4, 3),
            "layer.bias": file.get_tensor(f"{kind}/layer.bias/0"),
        }


def test_a_replay_writes_the_same_bytes(training: Training) -> None:
    """A killed run goes back to its checkpoint and comes by the same steps again."""
    before = {path: file_digest(path) for path in training.paths.averages.rglob("*.safetensors")}
    again = begin(training.paths.root, attempt="a2")
    again.go(range(STEPS))
    assert {path: file_digest(path) for path in training.paths.averages.rglob("*.safetensors")} == before
    assert len(before) == STEPS // EVERY


def test_what_lies_beyond_the_newest_checkpoint_is_another_history(training: Training) -> None:
    (training.paths.checkpoints / f"step-{STEPS:08d}").rename(training.paths.checkpoints / "step-00000130")
    record, _ = made_weights(reconstruct(training.paths, 0.10))
    assert record["step"] == 120
    with pytest.raises(ConfigError, match=r"--step 160: .*has snapshots after the steps 40, 80, 120$"):
        reconstruct(training.paths, 0.10, 160)


@pytest.mark.covers("F24")
def test_a_damaged_snapshot_is_named_and_left_out(
    training: Training, caplog: pytest.LogCaptureFixture
) -> None:
    file = training.paths.averages / "step-00000120" / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    record, _ = made_weights(reconstruct(training.paths, 0.10))
    assert "step-00000120" not in {name for name, _, _ in record["factors"]}
    assert "step-00000120/rank-00000.safetensors: sha256" in caplog.text
    with pytest.raises(CheckpointError, match="is damaged; take another --step"):
        reconstruct(training.paths, 0.10, 120)


def test_damaged_weights_are_refused(training: Training) -> None:
    folder = reconstruct(training.paths, 0.10)
    content = bytearray((folder / WEIGHTS_NAME).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS_NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match="make it again with `ldm ema`"):
        made_weights(folder)


@pytest.mark.parametrize("width", [0.0, -1.0, 0.3, float("nan")])
def test_widths_that_no_average_has_are_refused(training: Training, width: float) -> None:
    with pytest.raises(ConfigError, match="--sigma-rel"):
        reconstruct(training.paths, width)


def test_a_poor_fit_is_said_aloud(training: Training, caplog: pytest.LogCaptureFixture) -> None:
    reconstruct(training.paths, 0.27)
    assert "sigma_rel 0.27: its profile is met to" in caplog.text


def test_a_run_without_snapshots_is_told_how_to_have_them(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        reconstruct(paths, 0.1)
    (paths.checkpoints / "step-00000004").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"ema.posthoc: \{snapshot_every: N\}"):
        reconstruct(paths, 0.1)


def test_snapshots_of_another_run_are_not_mixed_in(training: Training) -> None:
    usable = usable_snapshots(training.paths.averages, STEPS)
    other = {name: value for name, value in usable[0][1].items() if name not in ("digest", "format")}
    sealed = seal({**other, "data_digest": "another"})
    write_json(usable[0][0] / "checkpoint.json", sealed)
    with pytest.raises(CheckpointError, match="differ in data_digest"):
        reconstruct(training.paths, 0.1)


@pytest.mark.covers("F22")
def test_a_full_disk_costs_a_snapshot_and_nothing_else(
    training: Training, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, stretches: Any) -> Any:
        path.write_bytes(b"half a file")
        raise OSError(28, "No space left on device", str(path))

    again = begin(training.paths.root, attempt="a2")
    monkeypatch.setattr(snapshots_module, "write_stretches", full)
    again.go(range(10), snapshots=False)
    assert not again.snapshots.save(40, 160)
    assert "No space left on device" in caplog.text and "training goes on without it" in caplog.text
    assert len(usable_snapshots(training.paths.averages, STEPS)) == STEPS // EVERY
    assert not list(training.paths.averages.glob(".*"))


def test_a_stale_attempt_publishes_no_snapshot(tmp_path: Path) -> None:
    old = begin(tmp_path)
    old.go(range(5), snapshots=False)
    begin(tmp_path, attempt="a2")
    with pytest.raises(CheckpointError, match="attempt a2 has taken over"):
        old.snapshots.save(5, 20)
    assert usable_snapshots(old.paths.averages, STEPS) == []


def test_before_the_first_applied_step_there_is_no_snapshot(tmp_path: Path) -> None:
    assert not begin(tmp_path).snapshots.save(40, 160)


def test_groups_of_parameters_add_up(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model larger than the memory for sums is made in parts."""
    whole_record, whole_weights = made_weights(reconstruct(training.paths, 0.10))
    monkeypatch.setattr("pipeline.average.GROUP_ELEMENTS", 7)
    _, in_parts = made_weights(reconstruct(training.paths, 0.10))
    assert all(torch.equal(in_parts[name], tensor) for name, tensor in whole_weights.items())
    assert combined_weights([], np.array([]), whole_record["parameters"])["layer.bias"].sum() == 0


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return tiny_run(tmp_path_factory.mktemp("tiny"))


def test_weights_that_were_made_are_chosen_by_name(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `ldm sample RUN --weights NAME`; another name is asked of the checkpoint."""
    tiny.pretend_checkpoint(monkeypatch)
    folder = tiny.paths.weights / "posthoc-0.1-step-00000005"
    folder.mkdir(parents=True)
    save_file({name: tensor + 1.0 for name, tensor in tiny.weights["raw"].items()}, folder / WEIGHTS_NAME)
    facts = {"config": tiny.config.model_dump(mode="json"), "step": 5, "samples": 20}
    record = facts | {"data_digest": tiny.manifest.digest, "sha256": file_digest(folder / WEIGHTS_NAME)}
    write_json(folder / "weights.json", record)
    trained = Generator.load(tiny.paths, folder.name, "cpu").trained
    assert (trained.step, trained.weights, trained.checkpoint) == (5, folder.name, folder)
    assert torch.equal(
        trained.network.state_dict()["conv_in.bias"], tiny.weights["raw"]["conv_in.bias"] + 1.0
    )
    assert Generator.load(tiny.paths, "ema", "cpu").trained.step == tiny.step
