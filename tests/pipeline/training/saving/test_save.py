"""Writing checkpoints: whole or not at all, retention, and what they refuse to load."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import CheckpointError, ConfigError
from pipeline.training.saving import save as save_module
from pipeline.training.saving.checkpoint import load_weights, newest_checkpoint
from pipeline.training.saving.manifest import committed, read_manifest
from pipeline.training.saving.state import RunState
from tests.pipeline.training.stand_ins import StandInFragments, stand_in_checkpoints, state_after

WATCHER = """
import sys
from pathlib import Path
from pipeline.errors import CheckpointError
from pipeline.training.saving.manifest import committed, damaged_files, read_manifest
folder, looks, worst, wrong = Path(sys.argv[1]), 0, 99, 0
print("watching", flush=True)
while not (folder / "stop").exists():
    whole = 0
    for path in committed(folder):
        try:
            manifest = read_manifest(path)
            problems = list(damaged_files(path, manifest, sorted(manifest["files"])))
        except (CheckpointError, OSError):
            problems = ["gone or damaged"]
        if not problems:
            whole += 1
        elif path.exists() and path.parent.joinpath(path.name, "checkpoint.json").exists():
            # Gone between the listing and the reading is retention; still there and wrong is damage. Looked at twice, for
            # the same step may just have been replaced.
            try:
                again = read_manifest(path)
                wrong += bool(list(damaged_files(path, again, sorted(again["files"])))) and path.exists()
            except (CheckpointError, OSError):
                pass
    if whole == 0:
        whole = sum((path / "checkpoint.json").exists() for path in committed(folder))
    looks, worst = looks + 1, min(worst, whole)
print(looks, worst, wrong)
"""


def test_what_is_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    fragments = StandInFragments()
    checkpoints, ema = stand_in_checkpoints(tmp_path, fragments)
    assert checkpoints.resume() is None
    fragments.step()
    ema.update()
    saved = RunState(step=3, samples=24, skipped=2, skipped_in_a_row=1, interval=[0.1 + 0.2, 1.0])
    saved.skipped_ranges = [[1, 2]]
    saved.data_origin, saved.substituted = 8, {9: 4, 2**40: 0}
    assert checkpoints.save(saved)

    other = StandInFragments(seed=5)
    again, other_ema = stand_in_checkpoints(tmp_path, other, attempt="a2")
    resumed = again.resume()
    assert resumed is not None and resumed[0] == saved and other.updates == 1 and other_ema.updates == 1
    for mine, theirs in zip(fragments.owned, other.owned, strict=True):
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            assert torch.equal(getattr(mine, kind), getattr(theirs, kind))
    assert all(torch.equal(a, b) for a, b in zip(ema.averages, other_ema.averages, strict=True))
    assert again.saved_step == 3


def test_the_manifest_says_what_the_checkpoint_is(tmp_path: Path) -> None:
    fragments = StandInFragments()
    checkpoints, _ = stand_in_checkpoints(tmp_path, fragments)
    checkpoints.resume()
    checkpoints.save(RunState())
    manifest = read_manifest(tmp_path / "step-00000000")
    assert manifest["world_size"] == 1 and manifest["attempt"] == "a1" and manifest["data_digest"] == "d"
    assert manifest["parameters"] == {"layer.weight": [4, 3], "layer.bias": [5]}
    assert manifest["ema"]["updates"] == 0 and manifest["skipped_ranges"] == [] and manifest["format"] == 3
    assert manifest["tracker_run_id"] == "run-7" and manifest["scheduler"] == {"schedule": "constant"}
    assert manifest["config_digest"] == hashlib.sha256(b"{}").hexdigest()
    assert (tmp_path / "latest").read_text() == "step-00000000\n"
    file = tmp_path / "step-00000000" / "rank-00000.safetensors"
    assert manifest["files"]["rank-00000.safetensors"]["bytes"] == file.stat().st_size
    assert 16 * fragments.total < file.stat().st_size < 16 * fragments.total + 2000


@pytest.mark.covers("F28")
@pytest.mark.faults
def test_at_every_instant_a_second_process_finds_a_whole_checkpoint(tmp_path: Path) -> None:
    """It looks without a pause while 60 saves come and go, two kept, the same steps twice over."""
    fragments = StandInFragments(shapes={"w": (100, 100)})
    checkpoints, _ = stand_in_checkpoints(tmp_path, fragments, keep_last=2)
    checkpoints.resume()
    assert checkpoints.save(RunState())
    watcher = subprocess.Popen(
        [sys.executable, "-c", WATCHER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert watcher.stdout is not None and watcher.stdout.readline() == "watching\n"
    try:
        for step in [*range(1, 40), *range(20, 40)]:
            fragments.updates = step
            assert checkpoints.save(state_after(step))
    finally:
        (tmp_path / "stop").touch()
        said, _ = watcher.communicate(timeout=60)
    looks, worst, wrong = map(int, said.split())
    assert watcher.returncode == 0 and looks > 20 and worst >= 1 and wrong == 0, said


def test_only_the_last_are_kept(tmp_path: Path) -> None:
    fragments = StandInFragments()
    checkpoints, _ = stand_in_checkpoints(tmp_path, fragments, keep_last=2)
    checkpoints.resume()
    for step in range(5):
        fragments.updates = step
        checkpoints.save(state_after(step))
        assert len(committed(tmp_path)) == min(step + 1, 2)
    assert [path.name for path in committed(tmp_path)] == ["step-00000003", "step-00000004"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_nothing_old_goes_before_the_new_one_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every rename and removal at least one checkpoint can be loaded."""
    fragments = StandInFragments()
    checkpoints, _ = stand_in_checkpoints(tmp_path, fragments, keep_last=2)
    checkpoints.resume()
    looked = []

    def watched(plain: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            if committed(tmp_path):
                newest_checkpoint(tmp_path)
                looked.append(plain.__name__)
            return plain(*arguments, **named)

        return call

    for step in range(4):
        fragments.updates = step
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", watched(os.replace))
            patch.setattr(shutil, "rmtree", watched(shutil.rmtree))
            checkpoints.save(state_after(step))
    assert looked.count("replace") >= 5 and "rmtree" in looked


def test_what_a_killed_attempt_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".step-00000007.tmp-123-abcd").mkdir()
    checkpoints, _ = stand_in_checkpoints(tmp_path, StandInFragments())
    assert checkpoints.resume() is None
    assert [path.name for path in tmp_path.iterdir()] == ["attempt.json"]


def test_damaged_checkpoints_step_aside_and_are_not_counted(tmp_path: Path) -> None:
    fragments = StandInFragments()
    checkpoints, _ = stand_in_checkpoints(tmp_path, fragments, keep_last=2)
    checkpoints.resume()
    for step in (0, 1, 2):
        fragments.updates = step
        checkpoints.save(state_after(step))
    (tmp_path / "step-00000002" / "rank-00000.safetensors").unlink()
    again, _ = stand_in_checkpoints(tmp_path, fragments, attempt="a2", keep_last=2)
    resumed = again.resume()
    assert resumed is not None and resumed[0].step == 1
    assert [path.name for path in committed(tmp_path)] == ["step-00000001"]
    assert (tmp_path / "damaged-step-00000002").is_dir()


@pytest.mark.covers("F38")
def test_a_missing_average_is_an_error_and_never_a_fresh_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints, _ = stand_in_checkpoints(tmp_path, StandInFragments())
    checkpoints.resume()
    plain = save_module.write_stretches
    monkeypatch.setattr(
        save_module,
        "write_stretches",
        lambda path, held, stop: plain(path, [stretch for stretch in held if stretch.kind != "ema"], stop),
    )
    checkpoints.save(RunState())
    again, _ = stand_in_checkpoints(tmp_path, StandInFragments(), attempt="a2")
    with pytest.raises(
        CheckpointError, match=r"lacks 2 of 8 pieces of the state \(ema/layer.bias/0, ema/layer"
    ):
        again.resume()
    with pytest.raises(CheckpointError, match="lacks"):
        load_weights(newest_checkpoint(tmp_path), "ema")


@pytest.mark.covers("F33")
def test_another_model_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    checkpoints, _ = stand_in_checkpoints(tmp_path, StandInFragments())
    checkpoints.resume()
    checkpoints.save(RunState())
    wider = StandInFragments(shapes={"layer.weight": (4, 3), "layer.bias": (6,)})
    before = [fragment.master.clone() for fragment in wider.owned]
    again, _ = stand_in_checkpoints(tmp_path, wider, attempt="a2")
    with pytest.raises(ConfigError, match=r"layer\.bias is \[5\] in the checkpoint, is \[6\]"):
        again.resume()
    assert all(torch.equal(a, b.master) for a, b in zip(before, wider.owned, strict=True))


def test_skipped_steps_count_as_consumed_but_not_as_applied() -> None:
    state = RunState()
    for applied in (True, False, False, True, False):
        state.count(applied, 8)
    assert (state.step, state.samples, state.applied) == (5, 40, 2)
    assert (state.skipped, state.skipped_in_a_row) == (3, 1)
