"""Reading checkpoints: what counts as one, every kind of damage found and named, and the fall back to the one before."""

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import CheckpointError, ConfigError, PipelineError
from pipeline.publish import file_digest, write_json
from pipeline.training.saving import manifest as manifest_module
from pipeline.training.saving.checkpoint import (
    choose_checkpoint,
    load_weights,
    newest_checkpoint,
    refuse_other_model,
)
from pipeline.training.saving.manifest import committed, read_manifest, seal, set_aside
from pipeline.training.saving.state import RunState
from pipeline.training.world import World
from tests.faults.damage import flip_bit, restored, spread_offsets
from tests.pipeline.training.stand_ins import SHAPES, StandInFragments, stand_in_checkpoints

RANK = "rank-00000.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three checkpoints, steps 1 to 3, of a small state."""
    fragments = StandInFragments()
    checkpoints, ema = stand_in_checkpoints(tmp_path / "checkpoints", fragments)
    checkpoints.resume()
    for step in (1, 2, 3):
        fragments.step()
        ema.update()
        assert checkpoints.save(RunState(step=step, samples=8 * step))
    return tmp_path / "checkpoints"


def test_the_newest_is_found_and_its_weights_are_whole(folder: Path) -> None:
    newest = newest_checkpoint(folder)
    assert newest.name == "step-00000003"
    fragments = StandInFragments()
    for _ in range(3):
        fragments.step()
    raw, ema = load_weights(newest, "raw"), load_weights(newest, "ema")
    assert {name: tuple(tensor.shape) for name, tensor in raw.items()} == SHAPES
    for fragment in fragments.owned:
        assert torch.equal(raw[fragment.name].view(-1), fragment.master)
    assert not torch.equal(ema["layer.weight"], raw["layer.weight"])


def flip(path: Path, at: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[at % len(content)] ^= 1 << bit
    path.write_bytes(content)


@pytest.mark.parametrize("name", [RANK, "checkpoint.json"])
def test_every_flipped_bit_is_found(folder: Path, name: str) -> None:
    """One bit in every 7th byte of each file of the newest checkpoint; the intact file is put back each time."""
    path = folder / "step-00000003" / name
    intact = path.read_bytes()
    for at in range(0, len(intact), 7):
        flip(path, at, bit=at % 8)
        chosen = choose_checkpoint(folder, World())
        assert chosen is not None and chosen[0].name == "step-00000002", at
        assert [damaged.name for damaged in chosen[2]] == ["step-00000003"]
        path.write_bytes(intact)
    assert newest_checkpoint(folder).name == "step-00000003"


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "rank file removed": lambda path: (path / RANK).unlink(),
    "rank file empty": lambda path: (path / RANK).write_bytes(b""),
    "rank file cut": lambda path: os.truncate(path / RANK, 100),
    "rank file longer": lambda path: (path / RANK).write_bytes((path / RANK).read_bytes() + b"\0"),
    "rank file zeroed": lambda path: (path / RANK).write_bytes(bytes((path / RANK).stat().st_size)),
    "manifest removed": lambda path: (path / "checkpoint.json").unlink(),
    "manifest empty": lambda path: (path / "checkpoint.json").write_bytes(b""),
    "manifest not JSON": lambda path: (path / "checkpoint.json").write_bytes(b"{"),
    "manifest a list": lambda path: (path / "checkpoint.json").write_bytes(b"[]"),
    "manifest not text": lambda path: (path / "checkpoint.json").write_bytes(b"\xff\xfe\x00"),
}


@pytest.mark.covers("F25", "F26")
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_the_one_before_is_taken(
    folder: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    DAMAGES[damage](folder / "step-00000003")
    assert newest_checkpoint(folder).name == "step-00000002"
    file = RANK if "rank" in damage else "checkpoint.json"
    assert f"step-00000003/{file}: " in caplog.text and "going back to" in caplog.text


@pytest.mark.faults
@pytest.mark.covers("F24")
def test_500_single_bit_flips_over_all_files_are_all_found(tmp_path: Path) -> None:
    """Spread over both files by their size, half in each at least; a number in exponent form among them."""
    fragments = StandInFragments(shapes={"w": (60, 50), "b": (60,)})
    checkpoints, _ = stand_in_checkpoints(tmp_path, fragments)
    checkpoints._facts["config"] = {"optimizer": {"learning_rate": 1e-05, "name": "größer"}}
    checkpoints.resume()
    for step in (1, 2):
        fragments.step()
        assert checkpoints.save(RunState(step=step, samples=8 * step))
    newest, draw, found = (
        tmp_path / "step-00000002",
        random.Random(0),
        dict.fromkeys((RANK, "checkpoint.json"), 0),
    )
    for name in found:
        path = newest / name
        size = path.stat().st_size
        places = [(at, draw.randrange(8)) for at in spread_offsets(size, 250, seed=1)]
        if name != RANK:
            place = path.read_bytes().index(b"1e-05") + 1
            places[100] = (place, 5)  # Makes an E of the e: the same number, yet damage.
        for at, bit in places:
            with restored(path):
                flip_bit(path, at, bit)
                chosen = choose_checkpoint(tmp_path, World())
                assert chosen is not None and chosen[0].name == "step-00000001", (name, at, bit)
                assert [damaged.name for damaged in chosen[2]] == ["step-00000002"]
                found[name] += 1
    assert found == {RANK: 250, "checkpoint.json": 250}
    assert newest_checkpoint(tmp_path) == newest


def test_two_damaged_ones_fall_back_to_the_third(folder: Path) -> None:
    flip(folder / "step-00000003" / RANK, 200)
    flip(folder / "step-00000002" / RANK, 200)
    assert newest_checkpoint(folder).name == "step-00000001"


@pytest.mark.covers("F26")
def test_nothing_valid_is_an_error_that_names_everything(folder: Path) -> None:
    for path in committed(folder):
        flip(path / RANK, 200)
    with pytest.raises(CheckpointError, match="none of its 3 checkpoints is valid") as raised:
        newest_checkpoint(folder)
    assert all(f"step-0000000{step}/{RANK}" in str(raised.value) for step in (1, 2, 3))


def test_an_empty_folder_is_no_checkpoint_and_no_error_for_training(tmp_path: Path) -> None:
    assert choose_checkpoint(tmp_path, World()) is None
    assert choose_checkpoint(tmp_path / "not there", World()) is None
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        newest_checkpoint(tmp_path)


def test_temporary_and_foreign_names_do_not_count(tmp_path: Path) -> None:
    for name in (".step-00000009.tmp-1-ab", "step-9", "step-0000000x", "best", "attempt.json"):
        (tmp_path / name).mkdir()
    assert committed(tmp_path) == []


def test_checkpoints_beyond_eight_digits_stay_in_order(tmp_path: Path) -> None:
    for name in ("step-100000000", "step-99999999"):
        (tmp_path / name).mkdir()
    assert [path.name for path in committed(tmp_path)] == ["step-99999999", "step-100000000"]


def test_only_set_aside_ones_left_is_an_error_too(folder: Path) -> None:
    set_aside(committed(folder))
    assert committed(folder) == []
    with pytest.raises(CheckpointError, match="damaged-step-00000001"):
        choose_checkpoint(folder, World())


@pytest.mark.covers("F34")
def test_a_checkpoint_of_the_first_format_is_read_to_the_bit(tmp_path: Path) -> None:
    """Written by the first version of this code; what has come since is filled in."""
    shutil.copytree(Path(__file__).parent / "golden" / "format-1", tmp_path, dirs_exist_ok=True)
    before = StandInFragments(seed=3)
    for _ in range(2):
        before.step()
    fragments = StandInFragments(seed=8)
    checkpoints, ema = stand_in_checkpoints(tmp_path, fragments, attempt="a2")
    resumed = checkpoints.resume()
    assert resumed is not None
    state, manifest = resumed
    assert (state.step, state.samples, state.skipped, state.loss) == (3, 24, 1, 0.5)
    assert state.skipped_ranges == [] and manifest["tracker_run_id"] is None
    assert fragments.updates == ema.updates == 2 and state.interval == [0.25, 1.0]
    for mine, theirs in zip(before.owned, fragments.owned, strict=True):
        assert torch.equal(mine.master, theirs.master) and torch.equal(mine.exp_avg_sq, theirs.exp_avg_sq)
    fragments.step()
    state.count(True, 8)
    assert checkpoints.save(state)
    assert (state.data_origin, state.substituted, manifest["data"]) == (0, {}, {})
    assert [read_manifest(path)["format"] for path in committed(tmp_path)] == [3, 3]
    assert json.loads((tmp_path / "step-00000003" / "checkpoint.json").read_text())["format"] == 1


def test_a_checkpoint_of_the_second_format_is_read_to_the_bit(tmp_path: Path) -> None:
    """Written by the code before format 3: no data origin, no substitutes, no list of data sets."""
    shutil.copytree(Path(__file__).parent / "golden" / "format-2", tmp_path, dirs_exist_ok=True)
    before, fragments = StandInFragments(seed=3), StandInFragments(seed=8)
    for _ in range(2):
        before.step()
    checkpoints, ema = stand_in_checkpoints(tmp_path, fragments, attempt="a2")
    resumed = checkpoints.resume()
    assert resumed is not None
    expected = RunState(
        step=3, samples=24, skipped=1, skipped_ranges=[[8, 16]], loss=0.5, interval=[0.25, 1.0]
    )
    assert resumed[0] == expected and fragments.updates == ema.updates == 2
    for mine, theirs in zip(before.owned, fragments.owned, strict=True):
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            assert torch.equal(getattr(mine, kind), getattr(theirs, kind))


@pytest.mark.covers("F34")
def test_another_format_says_which(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "step-00000003"
    manifest = read_manifest(path)
    monkeypatch.setattr(manifest_module, "FORMAT", 4)
    write_json(
        path / "checkpoint.json", seal({name: manifest[name] for name in manifest.keys() - {"digest"}})
    )
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="format 4, this version reads formats 1 to 3"):
        read_manifest(path)


@pytest.mark.parametrize("name", ["../../etc/passwd", "rank-00000.bin", "/abs", ""])
def test_a_manifest_cannot_name_other_files(folder: Path, name: str) -> None:
    path = folder / "step-00000003"
    manifest = read_manifest(path)
    del manifest["digest"]
    manifest["files"] = {name: manifest["files"][RANK]} if name else {}
    write_json(path / "checkpoint.json", seal(manifest))
    with pytest.raises(CheckpointError, match="names files that no checkpoint has"):
        read_manifest(path)


@pytest.mark.covers("F38")
@pytest.mark.parametrize("field", ["samples", "ema", "interval", "parameters"])
def test_a_manifest_without_a_field_is_refused(folder: Path, field: str) -> None:
    path = folder / "step-00000003"
    manifest = read_manifest(path)
    del manifest["digest"], manifest[field]
    write_json(path / "checkpoint.json", seal(manifest))
    with pytest.raises(CheckpointError, match=f"lacks {field}"):
        read_manifest(path)


def test_weights_of_a_damaged_checkpoint_are_refused(folder: Path) -> None:
    flip(folder / "step-00000003" / RANK, -1)
    with pytest.raises(CheckpointError, match="sha256"):
        load_weights(folder / "step-00000003", "ema")


def test_an_unreadable_file_is_not_damage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EIO may pass: no fall back, no exit code that says never again."""

    def unreadable(path: Path) -> str:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(manifest_module, "file_digest", unreadable)
    with pytest.raises(PipelineError, match="Input/output error") as raised:
        choose_checkpoint(folder, World())
    assert raised.value.exit_code == 1


def test_a_wrong_hash_that_is_right_the_second_time_is_no_damage(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, calls = manifest_module.file_digest, []

    def sometimes(path: Path) -> str:
        calls.append(path)
        return "0" * 64 if len(calls) == 1 else plain(path)

    monkeypatch.setattr(manifest_module, "file_digest", sometimes)
    assert newest_checkpoint(folder).name == "step-00000003" and len(calls) == 2


@pytest.mark.covers("F33")
def test_another_model_is_refused_key_by_key(tmp_path: Path) -> None:
    saved = {"a": [2, 3], "b": [4], "c": [1]}
    refuse_other_model(tmp_path, saved, {"a": (2, 3), "b": (4,), "c": (1,)})
    with pytest.raises(ConfigError) as raised:
        refuse_other_model(tmp_path, saved, {"a": (2, 5), "b": (4,), "d": (1,)})
    lines = "\n".join(raised.value.problems)
    assert "a is [2, 3] in the checkpoint, is [2, 5] in the config's model" in lines
    assert "c is [1] in the checkpoint, is absent" in lines and "d is absent in the checkpoint" in lines
    assert " b " not in lines


@pytest.mark.covers("F37")
def test_a_pickle_in_the_place_of_a_file_is_data_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    """Even sealed anew by whoever put it there, in the place of weights or of the manifest, it never runs."""
    marker = tmp_path / "executed"

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (marker,))

    newest = folder / "step-00000003"
    (newest / RANK).write_bytes(pickle.dumps(Payload()))
    manifest = {
        name: value for name, value in read_manifest(newest).items() if name not in ("digest", "format")
    }
    manifest["files"] = {
        RANK: {"bytes": (newest / RANK).stat().st_size, "sha256": file_digest(newest / RANK)}
    }
    write_json(newest / "checkpoint.json", seal(manifest))
    with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors: not a fragment file"):
        stand_in_checkpoints(folder, StandInFragments(), attempt="a2")[0].resume()
    (newest / "checkpoint.json").write_bytes(pickle.dumps(Payload()))
    assert newest_checkpoint(folder).name == "step-00000002"
    assert not marker.exists()


def test_no_file_of_a_checkpoint_is_a_pickle(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix or path.name for path in files} == {".json", ".safetensors", "latest"}
    for path in files:
        if path.suffix == ".json":
            json.loads(path.read_text())
