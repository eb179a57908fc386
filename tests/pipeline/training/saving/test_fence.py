"""The fence: at whatever moment a newer attempt takes over, the older one publishes nothing after it."""

import os
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import CheckpointError
from pipeline.training.saving import commit as commit_module
from pipeline.training.saving.fence import Fence
from pipeline.training.saving.manifest import committed
from tests.faults import commit_main

POINTS = ("mkdir", "write_file", "write_json", "fsync_folder", "refuse_stale", "replace")


@pytest.mark.covers("F35")
@pytest.mark.parametrize("point", POINTS)
def test_taken_over_before_any_point_of_a_save_nothing_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """The newer attempt takes over, loads and saves right before the older one's next action."""
    Fence(tmp_path, "old").take()
    commit_main.save(tmp_path, 1, attempt="old")
    homes: dict[str, Any] = {"mkdir": Path, "write_file": commit_main, "refuse_stale": Fence, "replace": os}
    home = homes.get(point, commit_module)
    plain, taken = getattr(home, point), []

    def overtaken(*arguments: Any, **named: Any) -> Any:
        # Of all renames the one that publishes.
        if not taken and (point != "replace" or Path(arguments[1]).name.startswith("step-")):
            taken.append(point)
            with monkeypatch.context() as patch:
                patch.setattr(home, point, plain)
                Fence(tmp_path, "new").take()
                commit_main.save(tmp_path, 2, attempt="new")
        return plain(*arguments, **named)

    monkeypatch.setattr(home, point, overtaken)
    with pytest.raises(CheckpointError, match="attempt new has taken over this run; this one, old,"):
        commit_main.save(tmp_path, 3, attempt="old")
    assert taken
    assert [path.name for path in committed(tmp_path)] == ["step-00000001", "step-00000002"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_taking_removes_what_the_dead_left_and_nothing_else(tmp_path: Path) -> None:
    Fence(tmp_path, "a1").take()
    commit_main.save(tmp_path, 1)
    (tmp_path / ".step-00000002.tmp-x").mkdir()
    (tmp_path / ".step-00000002.tmp-x" / "rank-00000.safetensors").write_bytes(b"half")
    (tmp_path / ".attempt.json.tmp-y").write_bytes(b"{")
    (tmp_path / ".kept").touch()
    fence = Fence(tmp_path, "a2")
    fence.take()
    assert {path.name for path in tmp_path.iterdir()} == {".kept", "attempt.json", "latest", "step-00000001"}
    assert fence.held() and not Fence(tmp_path, "a1").held()
